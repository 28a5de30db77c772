"""Dimensions and parameter counts, held against the models themselves on the meta device."""

from fractions import Fraction

import pytest
import torch
import transformers
from multimodal import CONFIGS
from transformers.modeling_layers import GradientCheckpointingLayer

from mst_ds.model_shape import (
    ExpertShape,
    ModelShape,
    NormShape,
    families,
    language_config,
    load_config_of_shape,
    load_model_shape,
    with_language_config,
)
from mst_ds.structure import why_own_attention

SPECIAL_TOKENS = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    **SPECIAL_TOKENS,
}
GPT2_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 50, "vocab_size": 300}
SMALL_EXPERTS = {"num_experts_per_tok": 3, "moe_intermediate_size": 40}
SMALL_ROUTED_EXPERTS = {**SMALL_EXPERTS, "n_routed_experts": 6, "n_group": 1, "topk_group": 1}
SMALL_LATENTS = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
# Each with its biases and norms switched on where the config says whether.
FAMILIES = [
    ("ArceeConfig", {"mlp_bias": True}),
    ("CohereConfig", {"use_qk_norm": True, "tie_word_embeddings": False}),
    ("Cohere2Config", {"attention_bias": True}),
    ("DeepseekV3Config", SMALL_ROUTED_EXPERTS | SMALL_LATENTS | {"first_k_dense_replace": 1, "attention_bias": True}),
    ("DeepseekV3Config", SMALL_ROUTED_EXPERTS | SMALL_LATENTS | {"q_lora_rank": None, "n_shared_experts": 2}),
    ("Exaone4Config", {"head_dim": 32}),
    ("GemmaConfig", {"head_dim": 16}),
    ("Gemma2Config", {"head_dim": 32}),
    ("Gemma3TextConfig", {"head_dim": 32}),
    ("GlmConfig", {}),
    ("Glm4Config", {}),
    ("Glm4MoeConfig", SMALL_ROUTED_EXPERTS | {"use_qk_norm": True, "first_k_dense_replace": 2}),
    ("GPT2Config", GPT2_SIZES),
    ("GPT2Config", GPT2_SIZES | {"n_inner": 96}),
    ("GPTNeoXConfig", {"num_key_value_heads": None}),
    ("GPTNeoXConfig", {"num_key_value_heads": None, "attention_bias": False, "tie_word_embeddings": True}),
    ("GptOssConfig", {"num_local_experts": 6}),
    ("GraniteConfig", {"mlp_bias": True}),
    ("GraniteMoeConfig", {"num_local_experts": 6, "attention_bias": True}),
    ("LlamaConfig", {}),
    ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32}),
    ("MiniMaxM2Config", {"num_local_experts": 16}),
    ("Ministral3Config", {}),
    ("MistralConfig", {}),
    ("MixtralConfig", {"head_dim": 8}),
    ("NemotronConfig", {"attention_bias": True, "mlp_bias": True}),
    ("Olmo2Config", {"num_key_value_heads": 4}),
    ("Olmo2Config", {}),
    ("Olmo3Config", {}),
    ("OlmoeConfig", {"num_experts": 16, "num_key_value_heads": 4}),
    ("PhiConfig", {"qk_layernorm": True}),
    ("Phi3Config", {}),
    ("Qwen2Config", {}),
    (
        "Qwen2MoeConfig",
        SMALL_EXPERTS | {"num_experts": 6, "mlp_only_layers": [1], "shared_expert_intermediate_size": 80},
    ),
    ("Qwen3Config", {"head_dim": 32, "attention_bias": True}),
    ("Qwen3MoeConfig", SMALL_EXPERTS | {"num_experts": 6, "decoder_sparse_step": 2, "head_dim": 32}),
    ("SeedOssConfig", {"attention_out_bias": True}),
    ("SmolLM3Config", {"attention_bias": True}),
    ("Starcoder2Config", {}),
    ("Starcoder2Config", {"use_bias": False}),
]


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def build(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def config_of(family, changes):
    sizes = {} if family == "GPT2Config" else SMALL
    return getattr(transformers, family)(**sizes | SPECIAL_TOKENS | changes)


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_counts_are_those_of_the_model(family, changes):
    config = config_of(family, changes)
    model = build(config)
    shape = ModelShape.from_config(config)
    assert shape.counts_are_exact
    assert shape.has_own_attention is (why_own_attention(model) is not None)
    assert shape.parameter_count == parameter_count(model)
    assert shape.layer_parameter_count == max(map(parameter_count, layers_of(model)))
    assert shape.embedding_parameter_count == parameter_count(model.get_input_embeddings())
    head = model.get_output_embeddings()
    own = [parameter for parameter in head.parameters() if parameter is not model.get_input_embeddings().weight]
    assert shape.head_parameter_count == sum(parameter.numel() for parameter in own)
    # A token meets the experts that it is routed to, and everything else.
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert (shape.experts is not None) == (experts > 0)
    if shape.experts is not None:
        unused = 1 - Fraction(config.num_experts_per_tok, shape.experts.num_experts)
        assert shape.active_parameter_count == shape.parameter_count - unused * experts
        sparse = [
            layer for layer in layers_of(model) if any(".experts." in name for name, _ in layer.named_parameters())
        ]
        assert len(sparse) == shape.experts.num_sparse_layers == shape.num_hidden_layers - shape.num_dense_layers
    else:
        assert shape.active_parameter_count == shape.parameter_count


def test_every_family_of_the_table_is_compared_with_its_model():
    assert {config_of(family, changes).model_type for family, changes in FAMILIES} == set(families.FAMILIES)


def test_other_families_are_counted_as_similar_ones():
    """Within a tenth, of what is built like Llama or Mixtral, and said to be no exact count."""
    for family, changes in (("BitNetConfig", {}), ("StableLmConfig", {}), ("PhimoeConfig", {"num_local_experts": 4})):
        config = config_of(family, changes)
        shape = ModelShape.from_config(config)
        assert not shape.counts_are_exact
        assert shape.parameter_count == pytest.approx(parameter_count(build(config)), rel=0.1)


# transformers' names of their sizes are not always Llama's.
OWN_ATTENTION_SIZES = {
    "mpt": {"d_model": 64, "n_heads": 4},
    "gpt_neo": {"attention_types": [[["global"], 3]], "num_layers": 3},
}


@pytest.mark.parametrize("kind", sorted(families.OWN_ATTENTION))
def test_attention_that_is_not_this_projects_is_known_by_the_config(kind):
    config = transformers.CONFIG_MAPPING[kind](**SMALL | SPECIAL_TOKENS | OWN_ATTENTION_SIZES.get(kind, {}))
    assert ModelShape.from_config(config).has_own_attention
    assert why_own_attention(build(config)) is not None


def test_dimensions_are_the_configs():
    shape = ModelShape.from_config(transformers.LlamaConfig(**SMALL | {"head_dim": 24}))
    assert (shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers, shape.vocab_size) == (
        64,
        96,
        3,
        300,
    )
    assert (shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim) == (4, 2, 24)


def test_other_names_and_missing_optional_dimensions_are_understood():
    shape = ModelShape.from_config(transformers.GPT2Config(**GPT2_SIZES))
    assert (shape.hidden_size, shape.intermediate_size, shape.num_key_value_heads, shape.head_dim) == (
        64,
        256,
        4,
        16,
    )
    assert shape.position_parameter_count == 50 * 64


@pytest.mark.parametrize("family", ["BertConfig", "T5Config", "BartConfig", "ViTConfig"])
def test_what_is_not_a_decoder_is_refused(family):
    with pytest.raises(ValueError, match="is not a decoder; allowed: decoder-only causal language models") as error:
        ModelShape.from_config(getattr(transformers, family)())
    assert "\n" not in str(error.value)


def test_a_multimodal_model_is_refused_with_its_text_model():
    with pytest.raises(ValueError, match=r"'gemma3' is multimodal; allowed: .* its part 'gemma3_text'") as error:
        ModelShape.from_config(transformers.Gemma3Config())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_language_model_of_a_multimodal_one_is_planned(name, tmp_path):
    config = CONFIGS[name]()
    config.save_pretrained(tmp_path)
    shape = load_model_shape(str(tmp_path))
    language = language_config(config)
    assert shape == ModelShape.from_config(language) == ModelShape.from_config(load_config_of_shape(str(tmp_path)))
    # Whether the head is tied is said by the whole model's config.
    assert shape.tie_word_embeddings == config.tie_word_embeddings
    assert with_language_config(config, language).to_dict() == config.to_dict()
    assert language_config(language) is language


def test_key_value_heads_that_do_not_divide_the_query_heads_are_refused():
    config = transformers.LlamaConfig(num_attention_heads=32, num_key_value_heads=5)
    with pytest.raises(ValueError, match=r"num_key_value_heads .* is 5; allowed: a divisor of its num_attention_heads"):
        ModelShape.from_config(config)


def test_a_decoder_without_attention_heads_is_refused():
    with pytest.raises(ValueError, match="num_attention_heads in the config of model type 'mamba' is None"):
        ModelShape.from_config(transformers.MambaConfig())


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("MixtralConfig", {"num_experts_per_tok": None}, "num_experts_per_tok"),
        ("LlamaConfig", {"intermediate_size": [96, 96, 128]}, "intermediate_size"),
        ("LlamaConfig", {"vocab_size": -1}, "vocab_size"),
    ],
)
def test_a_size_that_is_no_number_is_refused(family, changes, name):
    config = config_of(family, {})
    for field, value in changes.items():
        object.__setattr__(config, field, value)  # past transformers' own check
    with pytest.raises(
        ValueError, match=f"{name} in the config of model type .* allowed: a whole number >= 1"
    ) as error:
        ModelShape.from_config(config)
    assert "\n" not in str(error.value)


def test_a_size_that_differs_between_layers_is_refused(monkeypatch):
    """transformers raises a RuntimeError for a field that has no one value."""

    def ambiguous(config):
        raise RuntimeError("'head_dim' is a per-layer attribute")

    config = config_of("LlamaConfig", {})
    monkeypatch.setattr(transformers.LlamaConfig, "head_dim", property(ambiguous))
    with pytest.raises(ValueError, match=r"head_dim in .* 'llama' is 'not the same in all layers'; allowed"):
        ModelShape.from_config(config)


def test_experts_are_read_under_each_familys_names():
    qwen2 = config_of("Qwen2MoeConfig", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40})
    qwen2.shared_expert_intermediate_size = 80
    assert ModelShape.from_config(qwen2).experts == ExpertShape(6, 2, 40, 80, 3)
    deepseek = config_of("DeepseekV3Config", SMALL_ROUTED_EXPERTS | SMALL_LATENTS | {"n_shared_experts": 2})
    deepseek.first_k_dense_replace = 1
    assert ModelShape.from_config(deepseek).experts == ExpertShape(6, 3, 40, 80, 2)
    mixtral = config_of("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2})
    assert ModelShape.from_config(mixtral).experts == ExpertShape(8, 2, 96, 0, 3)
    ernie = config_of("Ernie4_5_MoeConfig", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 40})
    ernie.moe_num_shared_experts, ernie.moe_layer_start_index = 1, 2
    assert ModelShape.from_config(ernie).experts == ExpertShape(4, 2, 40, 40, 1)
    by_kind = config_of("Glm4MoeLiteConfig", SMALL_ROUTED_EXPERTS | SMALL_LATENTS | {"n_shared_experts": 1})
    by_kind.mlp_layer_types = ["dense", "sparse", "dense"]
    assert ModelShape.from_config(by_kind).experts == ExpertShape(6, 3, 40, 40, 1)


def test_a_model_whose_layers_are_all_dense_has_no_experts():
    config = config_of("Qwen3MoeConfig", {"mlp_only_layers": [0, 1, 2]})
    assert ModelShape.from_config(config).experts is None
    assert ModelShape.from_config(config).parameter_count == parameter_count(build(config))


def test_more_experts_per_token_than_there_are_is_refused():
    config = config_of("MixtralConfig", {"num_local_experts": 2, "num_experts_per_tok": 4})
    with pytest.raises(ValueError, match="'mixtral' is 4; allowed: 1 to its number of experts, 2"):
        ModelShape.from_config(config)


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("LlamaConfig", {}, ()),
        ("MistralConfig", {"sliding_window": 7}, (7, 7, 7)),
        ("MistralConfig", {"sliding_window": None}, ()),
        ("Qwen2Config", {"sliding_window": 7, "use_sliding_window": False}, ()),
        ("Qwen2Config", {"sliding_window": 7, "use_sliding_window": True, "max_window_layers": 2}, (7,)),
        ("Gemma2Config", {"sliding_window": 7}, (7, 7)),
    ],
)
def test_sliding_windows_are_those_of_the_layers(family, changes, windows):
    assert ModelShape.from_config(config_of(family, changes)).sliding_windows == windows


def test_what_the_planner_needs_to_know_of_attention_logits_and_norms():
    gemma2 = ModelShape.from_config(config_of("Gemma2Config", {}))
    assert gemma2.has_logit_softcap
    assert gemma2.has_attention_softcap
    assert gemma2.norms == NormShape("rms_fp32", pre_norms=2, post_norms=2, query_key_width=0)
    qwen3 = ModelShape.from_config(config_of("Qwen3Config", {"head_dim": 24}))
    assert not qwen3.has_logit_softcap
    assert not qwen3.has_attention_softcap
    assert qwen3.norms == NormShape("rms", pre_norms=2, post_norms=0, query_key_width=6 * 24)
    phi = ModelShape.from_config(config_of("PhiConfig", {"qk_layernorm": False}))
    assert phi.norms == NormShape("layer", pre_norms=1, post_norms=0, query_key_width=0)
    assert not phi.gated_mlp
    router = {flag: config_of("MixtralConfig", {"output_router_logits": flag}) for flag in (False, True)}
    assert [ModelShape.from_config(config).has_router_loss for config in router.values()] == [False, True]
    # Queries and keys of latent attention are wider than values.
    deepseek = ModelShape.from_config(config_of("DeepseekV3Config", SMALL_ROUTED_EXPERTS | SMALL_LATENTS))
    assert (deepseek.head_dim, deepseek.value_head_dim) == (20, 10)

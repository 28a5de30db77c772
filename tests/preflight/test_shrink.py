"""The small model has the user's architecture, whatever its size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from mst_ds.preflight.shrink import random_fields
from mst_ds.preflight.small_model import build_small_model

SEQ_LEN = 41
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = {
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": LLAMA_3_ROPE,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
}


def small(model_type: str, **values: Any) -> PreTrainedModel:
    return build_small_model(AutoConfig.for_model(model_type, **values), seq_len=SEQ_LEN)


def layers(model: PreTrainedModel) -> nn.ModuleList:
    return next(module for module in model.modules() if isinstance(module, nn.ModuleList))


def test_llama() -> None:
    config = AutoConfig.for_model("llama", **LLAMA)
    model = build_small_model(config, seq_len=SEQ_LEN)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(parameter.numel() for parameter in model.parameters()) < 20_000
    shrunk = model.config
    assert (shrunk.num_attention_heads, shrunk.num_key_value_heads) == (8, 2)
    assert shrunk.rope_parameters == config.rope_parameters
    assert shrunk.hidden_act == "silu"
    assert shrunk.num_hidden_layers == 2
    assert not shrunk.tie_word_embeddings
    assert all(0 <= token < shrunk.vocab_size for token in (shrunk.bos_token_id, *shrunk.eos_token_id))


def test_the_users_config_is_left_as_it_is() -> None:
    config = AutoConfig.for_model("llama", **LLAMA)
    before = copy.deepcopy(config.to_dict())
    build_small_model(config, seq_len=SEQ_LEN)
    assert config.to_dict() == before
    assert config._attn_implementation_internal is None


def test_weights_are_the_same_every_time_and_each_counts() -> None:
    state = torch.get_rng_state()
    first, second = (small("qwen2").state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == torch.float64, name
        assert torch.equal(tensor, second[name]), name
        assert not ((tensor == 0) | (tensor == 1)).any(), name


def test_a_buffer_that_is_saved_is_random_too() -> None:
    buffers = dict(small("deepseek_v3").named_buffers())
    corrections = [tensor for name, tensor in buffers.items() if name.endswith("e_score_correction_bias")]
    assert corrections
    assert all(tensor.all() for tensor in corrections)


def test_frequencies_are_not_rounded() -> None:
    inv_freq = small("llama").model.rotary_emb.inv_freq
    assert inv_freq.dtype == torch.float64
    assert not torch.equal(inv_freq, inv_freq.float().double())


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **values}}


LONGROPE = {
    **rope(
        "longrope",
        short_factor=[1.0 + index for index in range(48)],
        long_factor=[9.0 + index for index in range(48)],
    ),
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
}


def is_long(config: PreTrainedConfig) -> bool:
    """Whether test sequences are beyond the original length, at the same extension: it scales the attention."""
    original = config.rope_parameters["original_max_position_embeddings"]
    return (
        original < SEQ_LEN // 4
        and config.max_position_embeddings == 32 * original
        and config.rope_parameters["long_factor"] == [9.0, 33.0]
    )


# Model type, values of its config, and what of the architecture the small model has to have as well: of its config (c)
# or of the model (m).
KEPT: dict[str, tuple[str, dict[str, Any], Any]] = {
    "tied": ("llama", {"tie_word_embeddings": True}, lambda c, m: m.lm_head.weight is m.model.embed_tokens.weight),
    "biases": ("llama", {"mlp_bias": True}, lambda c, m: layers(m)[0].mlp.up_proj.bias is not None),
    "one-key-value-head": ("gemma", {"num_key_value_heads": 1}, lambda c, m: c.num_key_value_heads == 1),
    "all-key-value-heads": ("olmo2", {}, lambda c, m: c.num_key_value_heads == c.num_attention_heads == 4),
    "head-dim-of-its-own": (
        "qwen3",
        {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
        lambda c, m: c.head_dim * c.num_attention_heads != c.hidden_size,
    ),
    "no-head-dim": ("gpt2", {}, lambda c, m: c.n_embd % c.n_head == 0),
    "partial-rotary": ("gpt_neox", {"rotary_pct": 0.25}, lambda c, m: m.gpt_neox.rotary_emb.inv_freq.shape == (1,)),
    "two-fifths-rotary": (
        "phi",
        rope("default", partial_rotary_factor=0.4),
        lambda c, m: m.model.rotary_emb.inv_freq.shape == (3,),
    ),
    "rotary-dim": ("gptj", {}, lambda c, m: 4 * c.rotary_dim == c.n_embd // c.n_head),
    "config-of-a-part": (
        "dbrx",
        {"n_heads": 48, "attn_config": {"kv_n_heads": 8, "rope_theta": 500_000}},
        lambda c, m: (c.attn_config.rope_theta, c.attn_config.kv_n_heads, c.ffn_config.ffn_hidden_size) == (5e5, 2, 40),
    ),
    "pattern-of-layers": ("gpt_neo", {}, lambda c, m: c.attention_types == [[["global", "local"], 1]]),
    "heads-that-follow-from-others": ("jetmoe", {}, lambda c, m: c.num_attention_heads == 2 * c.num_key_value_heads),
    # Of each kind two, as weights that layers share are of several.
    "weights-of-several-layers": (
        "zamba",
        {},
        lambda c, m: (
            c.attention_hidden_size == 2 * c.hidden_size
            and layers(m)[2].shared_transf.self_attn.q_proj.weight is layers(m)[3].shared_transf.self_attn.q_proj.weight
        ),
    ),
    "two-sublayers-a-layer": ("longcat_flash", {}, lambda c, m: (c.num_layers, c.num_hidden_layers) == (2, 4)),
    "heads-of-a-window": (
        "inkling_text",
        {},
        lambda c, m: (c.swa_num_attention_heads, c.swa_num_key_value_heads) == (8, 2),
    ),
    "softcaps": ("gemma2", {}, lambda c, m: (c.attn_logit_softcapping, c.final_logit_softcapping) == (50.0, 30.0)),
    "scale-of-the-query": (
        "gemma2",
        {"head_dim": 128, "query_pre_attn_scalar": 256},
        lambda c, m: c.query_pre_attn_scalar == 2 * c.head_dim,
    ),
    "scales": (
        "granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 16.0, "residual_multiplier": 0.22},
        lambda c, m: (c.embedding_multiplier, c.logits_scaling, c.residual_multiplier) == (12.0, 16.0, 0.22),
    ),
    "window": ("mistral", {"sliding_window": 4096}, lambda c, m: 1 < c.sliding_window < SEQ_LEN // 4),
    "no-window": ("mistral", {"sliding_window": None}, lambda c, m: c.sliding_window is None),
    "windows-in-some-layers": (
        "gemma3_text",
        {},
        lambda c, m: c.layer_types == ["sliding_attention", "full_attention"],
    ),
    "windows-from-a-layer-on": (
        "qwen2",
        {"use_sliding_window": True, "max_window_layers": 28, "num_hidden_layers": 32, "sliding_window": 4096},
        lambda c, m: [layer.self_attn.sliding_window is None for layer in layers(m)] == [True, False],
    ),
    "layers-without-rotary": ("smollm3", {}, lambda c, m: [layer.self_attn.use_rope for layer in layers(m)] == [1, 0]),
    "sinks": ("gpt_oss", {}, lambda c, m: layers(m)[0].self_attn.sinks.shape == (8,)),
    "longrope": ("phi3", LONGROPE, lambda c, m: is_long(c)),
    "dynamic-rope": ("llama", rope("dynamic", factor=4.0), lambda c, m: c.max_position_embeddings < SEQ_LEN // 4),
    "dynamic-rope-beyond-its-training": (
        "llama",
        rope("dynamic", factor=4.0, original_max_position_embeddings=128),
        lambda c, m: c.max_position_embeddings < SEQ_LEN // 4,
    ),
    # Of one pair dynamic frequencies are a division by zero.
    "dynamic-rope-of-a-part": (
        "glm",
        rope("dynamic", factor=4.0, partial_rotary_factor=0.5),
        lambda c, m: m.model.rotary_emb.inv_freq.shape == (2,),
    ),
    "learned-positions": ("gpt2", {}, lambda c, m: m.transformer.wpe.weight.shape[0] == SEQ_LEN),
    "experts": (
        "mixtral",
        {"output_router_logits": True},
        lambda c, m: (m.num_experts, m.num_experts_per_tok, c.output_router_logits) == (4, 2, True),
    ),
    "shared-expert": ("qwen2_moe", {}, lambda c, m: hasattr(layers(m)[0].mlp, "shared_expert")),
    "dense-layers-first": (
        "deepseek_v3",
        {"first_k_dense_replace": 3},
        lambda c, m: [hasattr(layer.mlp, "experts") for layer in layers(m)] == [False, False, False, True],
    ),
    "dense-layers-between": (
        "qwen3_moe",
        {"decoder_sparse_step": 2},
        lambda c, m: [hasattr(layer.mlp, "experts") for layer in layers(m)] == [False, True],
    ),
    "groups-of-experts": ("deepseek_v3", {}, lambda c, m: (c.n_group, c.topk_group) == (2, 1)),
    "latent-attention": ("deepseek_v3", {}, lambda c, m: c.qk_head_dim != c.v_head_dim),
    "no-query-latent": ("deepseek_v3", {"q_lora_rank": None}, lambda c, m: c.q_lora_rank is None),
    "layers-by-period": (
        "jamba",
        {},
        lambda c, m: [hasattr(layer, "mamba") for layer in layers(m)] == [True, True, True, True, False],
    ),
    "heads-of-a-layer": (
        "gemma4_text",
        {"num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2}
        | {"attention_k_eq_v": True},
        lambda c, m: (
            [
                (each.self_attn.head_dim, each.self_attn.k_proj.weight.shape[0], each.self_attn.v_proj is None)
                for each in layers(m)
            ]
            == [(8, 16, False), (16, 16, True)]
        ),
    ),
    "latents-of-a-layer": (
        "dots3_note_text",
        {},
        lambda c, m: (
            [
                (each.self_attn.num_heads, each.self_attn.qk_nope_head_dim, each.self_attn.kv_lora_rank)
                for each in layers(m)
            ]
            == [(4, 6, 8), (4, 6, 8), (2, 9, 16)]
        ),
    ),
    # Of each kind one that keeps its keys, one that hands them on, and one that reads them.
    "keys-of-earlier-layers": (
        "gemma3n_text",
        {},
        lambda c, m: (
            c.kv_sharing_modes == [None, None, "store", "store", "reuse", "reuse"]
            and c.activation_sparsity_pattern[:3] == [0.95, 0.95, 0.0]
        ),
    ),
    "vocabulary-of-some-tokens": (
        "gemma3n_text",
        {},
        lambda c, m: c.vocab_size_per_layer_input == c.vocab_size - 1,
    ),
    "widths-of-layers": (
        "gemma3n_text",
        {"num_hidden_layers": 4, "num_kv_shared_layers": 0, "intermediate_size": [300, 300, 600, 600]}
        | {"activation_sparsity_pattern": [0.0] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
        lambda c, m: c.intermediate_size == [20, 20, 40, 40],
    ),
    "dropouts-are-off": ("gpt2", {"attn_pdrop": 0.1}, lambda c, m: not random_fields(c)),
    "small-already": ("llama", {"num_hidden_layers": 1, "vocab_size": 11}, lambda c, m: c.vocab_size == 11),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept(name: str) -> None:
    model_type, values, holds = KEPT[name]
    model = small(model_type, **values)
    assert holds(model.config, model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000


def test_what_is_random() -> None:
    config = AutoConfig.for_model("gpt2", attn_pdrop=0.1, resid_pdrop=0.2, embd_pdrop=0.0, summary_first_dropout=0.0)
    assert random_fields(config) == ("attn_pdrop", "resid_pdrop")


def refusal(config: PreTrainedConfig) -> str:
    with pytest.raises(ValueError, match=type(config).__name__.removesuffix("Config")) as refused:
        build_small_model(config, seq_len=SEQ_LEN)
    text = str(refused.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("hrm_text", "has no list of the 128 layers that its config names"),  # it runs few layers often
        ("rwkv", "its num_attention_heads is None"),
        ("git", "still has"),  # another tower, whose config is a part
    ],
)
def test_what_cannot_be_shrunk(model_type: str, says: str) -> None:
    assert says in refusal(AutoConfig.for_model(model_type))


def test_what_cannot_be_built() -> None:
    assert "transformers cannot build the model" in refusal(AutoConfig.for_model("llama", hidden_act="silly"))


def test_layers_of_other_kinds_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all layers dense in the small model, it would say nothing of the experts."""
    monkeypatch.setattr(
        "mst_ds.preflight.small_model.shrink_config",
        lambda config, layers, seq_len: AutoConfig.for_model(
            "qwen3_moe", num_hidden_layers=len(layers), mlp_only_layers=list(range(len(layers)))
        ),
    )
    assert "not of the kinds that it has" in refusal(AutoConfig.for_model("qwen3_moe"))

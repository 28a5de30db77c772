"""Dimensions and parameter counts, held against the models themselves on the meta device."""

import pytest
import torch
import transformers

from mst_ds.model_shape import ModelShape, load_model_config, shipped_model_config

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
FAMILIES = [
    ("LlamaConfig", {}),
    ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32}),
    ("MistralConfig", {}),
    ("Qwen2Config", {}),
    ("Qwen3Config", {"head_dim": 32, "attention_bias": True}),
    ("GemmaConfig", {"head_dim": 16}),
    ("Gemma2Config", {"head_dim": 32}),
    ("Gemma3TextConfig", {"head_dim": 32}),
    ("Phi3Config", {}),
    ("Olmo2Config", {"num_key_value_heads": 4}),
    ("Olmo2Config", {}),
    ("GraniteConfig", {"mlp_bias": True}),
    ("SmolLM3Config", {"attention_bias": True}),
]


def parameter_count(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(("family", "changes"), FAMILIES)
def test_counts_are_those_of_the_model(family, changes):
    config = getattr(transformers, family)(**SMALL | changes)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = ModelShape.from_config(config)
    assert shape.counts_are_exact
    assert shape.parameter_count == parameter_count(model)
    assert shape.layer_parameter_count == parameter_count(model.model.layers[0])
    assert shape.embedding_parameter_count == parameter_count(model.model.embed_tokens)
    assert shape.head_parameter_count == (0 if shape.tie_word_embeddings else parameter_count(model.lm_head))


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
    shape = ModelShape.from_config(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300))
    assert (shape.hidden_size, shape.intermediate_size, shape.num_key_value_heads, shape.head_dim) == (
        64,
        256,
        4,
        16,
    )
    assert not shape.counts_are_exact


@pytest.mark.parametrize("family", ["BertConfig", "T5Config", "BartConfig", "ViTConfig"])
def test_what_is_not_a_decoder_is_refused(family):
    with pytest.raises(ValueError, match="is not a decoder; allowed: decoder-only causal language models") as error:
        ModelShape.from_config(getattr(transformers, family)())
    assert "\n" not in str(error.value)


def test_experts_are_refused():
    config = transformers.MixtralConfig(num_local_experts=8)
    with pytest.raises(ValueError, match="num_local_experts = 8; allowed: models with one MLP in each layer"):
        ModelShape.from_config(config)


def test_a_decoder_without_attention_heads_is_refused():
    with pytest.raises(ValueError, match="num_attention_heads in the config of model type 'mamba' is None"):
        ModelShape.from_config(transformers.MambaConfig())


def test_the_shipped_config_builds_a_model():
    config = load_model_config("small_llama")
    assert config.model_type == "llama"
    assert not config.use_cache
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert ModelShape.from_config(config).parameter_count == parameter_count(model)


def test_shipped_names():
    folder = shipped_model_config("small_llama")
    assert folder is not None
    assert (folder / "config.json").is_file()
    for name in ("small_lama", "", "..", "small_llama/.."):
        assert shipped_model_config(name) is None


def test_a_folder_is_read(tmp_path):
    transformers.Qwen3Config(**SMALL).save_pretrained(tmp_path)
    assert load_model_config(str(tmp_path)).model_type == "qwen3"


def test_a_folder_that_holds_no_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json cannot be read: ") as error:
        load_model_config(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_that_is_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "model 'small_lama' was not found; nearest: 'small_llama'; allowed: a shipped config"
    with pytest.raises(ValueError, match=message) as error:
        load_model_config("small_lama")
    assert "\n" not in str(error.value)

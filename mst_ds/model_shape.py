"""Dimensions and parameter counts of a decoder, from its Hugging Face config alone: no weights, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mst_ds.config import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_SHIPPED_CONFIGS = Path(__file__).parent / "model_configs"
_EXPERT_COUNT_NAMES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class _LayerParts:
    """What a decoder layer has beside its projection matrices.

    qkv_bias, output_bias, mlp_bias: None where the config's own `attention_bias` or `mlp_bias` decides.
    qk_norm: a norm over each head's dimension, or over all heads together.
    norms: norms over the hidden size.
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: Literal["none", "head", "all_heads"] = "none"
    norms: int = 2


_LLAMA_PARTS = _LayerParts()
# The families whose counts are exact (the tests compare each with the model built on the meta device).
_KNOWN_PARTS: Mapping[str, _LayerParts] = {
    "llama": _LLAMA_PARTS,
    "mistral": _LayerParts(qkv_bias=False, output_bias=False, mlp_bias=False),
    "qwen2": _LayerParts(qkv_bias=True, output_bias=False, mlp_bias=False),
    "qwen3": _LayerParts(qk_norm="head", mlp_bias=False),
    "gemma": _LayerParts(mlp_bias=False),
    "gemma2": _LayerParts(mlp_bias=False, norms=4),
    "gemma3_text": _LayerParts(qk_norm="head", mlp_bias=False, norms=4),
    "phi3": _LayerParts(qkv_bias=False, output_bias=False, mlp_bias=False),
    "olmo2": _LayerParts(qk_norm="all_heads", mlp_bias=False),
    "granite": _LLAMA_PARTS,
    "smollm3": _LLAMA_PARTS,
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder's dimensions, under Hugging Face's names, and its parameter counts.

    head_parameter_count is 0 where the head's weight is the embedding's (tie_word_embeddings).
    counts_are_exact is False for a family that is counted as if its layers were Llama's.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    layer_parameter_count: int
    embedding_parameter_count: int
    head_parameter_count: int
    parameter_count: int
    counts_are_exact: bool

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> ModelShape:
        """Reads a Hugging Face config.

        Raises:
            ValueError: not a decoder-only causal language model, a mixture of experts, or without a size.
        """
        _check_is_decoder(config)
        _check_is_dense(config)
        hidden = _dimension(config, "hidden_size")
        heads = _dimension(config, "num_attention_heads")
        layers = _dimension(config, "num_hidden_layers")
        vocab = _dimension(config, "vocab_size")
        intermediate = getattr(config, "intermediate_size", None) or 4 * hidden  # GPT-2's rule where it is None
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        layer = _layer_parameter_count(config, hidden, intermediate, heads * head_dim, kv_heads * head_dim, head_dim)
        tied = bool(config.tie_word_embeddings)
        head = 0 if tied else vocab * hidden
        return cls(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=vocab,
            tie_word_embeddings=tied,
            layer_parameter_count=layer,
            embedding_parameter_count=vocab * hidden,
            head_parameter_count=head,
            parameter_count=layers * layer + vocab * hidden + head + hidden,  # the last: the final norm
            counts_are_exact=config.model_type in _KNOWN_PARTS,
        )


def shipped_model_config(name: str) -> Path | None:
    """The folder of a config that ships with the package, or None."""
    return _SHIPPED_CONFIGS / name if name in _shipped_names() else None


def load_model_config(name_or_path: str) -> PreTrainedConfig:
    """Finds a config by shipped name, folder, or Hugging Face id, in this order.

    Raises:
        ValueError: found in none of these places, or not a config that transformers can read.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    shipped = shipped_model_config(name_or_path)
    folder = shipped or Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"model folder {name_or_path!r} has no config.json; allowed: a folder with one")
    try:
        return AutoConfig.from_pretrained(str(folder) if folder.is_dir() else name_or_path)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        names = _shipped_names()
        if folder.is_dir():
            reason = str(error).splitlines()[0]
            raise ValueError(f"model config {folder / 'config.json'} cannot be read: {reason}") from None
        raise ValueError(
            f"model {name_or_path!r} was not found{nearest(name_or_path, names)}; allowed: a shipped config "
            f"({', '.join(names)}), a folder with a config.json, or a Hugging Face id that can be reached"
        ) from None


def _shipped_names() -> list[str]:
    return sorted(path.parent.name for path in _SHIPPED_CONFIGS.glob("*/config.json"))


def _check_is_decoder(config: PreTrainedConfig) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    # Encoders such as BERT are in the mapping too, for those who set their is_decoder.
    is_decoder = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and (
        type(config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(config, "is_decoder", False)
    )
    if config.is_encoder_decoder or not is_decoder:
        raise ValueError(
            f"model type {config.model_type!r} is not a decoder; allowed: decoder-only causal language "
            "models such as llama, qwen3, mistral, gemma2"
        )


def _check_is_dense(config: PreTrainedConfig) -> None:
    for name in _EXPERT_COUNT_NAMES:
        experts = getattr(config, name, None)
        if isinstance(experts, int) and experts > 1:
            raise ValueError(
                f"model type {config.model_type!r} has {name} = {experts}; allowed: models with one MLP in each layer"
            )


def _dimension(config: PreTrainedConfig, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} in the config of model type {config.model_type!r} is {value!r}; allowed: >= 1")
    return value


def _layer_parameter_count(
    config: PreTrainedConfig, hidden: int, intermediate: int, query: int, key_value: int, head_dim: int
) -> int:
    """One decoder layer; `query` and `key_value` are the widths of all heads together."""
    parts = _KNOWN_PARTS.get(config.model_type, _LLAMA_PARTS)
    attention_bias = bool(getattr(config, "attention_bias", False))
    qkv_bias = attention_bias if parts.qkv_bias is None else parts.qkv_bias
    output_bias = attention_bias if parts.output_bias is None else parts.output_bias
    mlp_bias = bool(getattr(config, "mlp_bias", False)) if parts.mlp_bias is None else parts.mlp_bias
    attention = 2 * hidden * query + 2 * hidden * key_value
    attention += qkv_bias * (query + 2 * key_value) + output_bias * hidden
    attention += {"none": 0, "head": 2 * head_dim, "all_heads": query + key_value}[parts.qk_norm]
    mlp = 3 * hidden * intermediate + mlp_bias * (2 * intermediate + hidden)
    return attention + mlp + parts.norms * hidden

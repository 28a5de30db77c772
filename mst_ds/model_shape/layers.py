"""What differs from layer to layer of a decoder: heads, their sizes, MLPs, and whose keys and values a layer reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mst_ds.model_shape.mixers import MixerShape
from mst_ds.model_shape.sizes import optional_size, size

_INTERMEDIATE_NAMES = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


@dataclass(frozen=True)
class LayerShape:
    """A layer's own sizes, under Hugging Face's names.

    Attributes:
        intermediate_size: of its MLP, where it has a dense one.
        has_plain_mlp: False where autograd differentiates it, such as one whose gate is cut off before its activation
            (Gemma 3n).
        has_own_keys: it computes keys and values; else it reads those of an earlier layer.
        has_value_projection: False where values are made of what keys are made of.
        has_attention: False where a mixer stands in its place, if mixers have been measured; else all have.
        mixer: None where it has none, or `mst_ds.memory.mixers` has not measured it.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_head_dim: int
    intermediate_size: int
    has_plain_mlp: bool = True
    has_own_keys: bool = True
    has_value_projection: bool = True
    has_attention: bool = True
    mixer: MixerShape | None = None


def layer_configs(config: Any, num_layers: int) -> Sequence[Any]:
    """For each layer what has the fields of the config, with its own values."""
    if getattr(config, "is_heterogeneous", False):
        return list(config.per_layer_config)
    return [config] * num_layers


def read_layers(config: Any, num_layers: int) -> tuple[LayerShape, ...]:
    """The shape of each layer.

    Raises:
        ValueError: a layer without a size, or whose query heads are not a multiple of its key/value heads.
    """
    reads = _reading_layers(config, num_layers)
    kinds = list(getattr(config, "layer_types", None) or [""] * num_layers)
    return tuple(
        _layer(of_layer, index, kinds[index] if index < len(kinds) else "", is_reading=index in reads)
        for index, of_layer in enumerate(layer_configs(config, num_layers))
    )


def handed_on_width(config: Any, layers: Sequence[LayerShape]) -> int:
    """Of the keys and values of a token that later layers read: those of the last layer before these of each kind."""
    if all(layer.has_own_keys for layer in layers):
        return 0
    kinds = getattr(config, "layer_types", None) or [""] * len(layers)
    last = {kind: layer for kind, layer in zip(kinds, layers, strict=False) if layer.has_own_keys}
    return sum(layer.num_key_value_heads * (layer.head_dim + layer.value_head_dim) for layer in last.values())


def _layer(config: Any, index: int, kind: str, *, is_reading: bool) -> LayerShape:
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_dim = _latent_head_dim(config) or optional_size(config, "qk_head_dim", "head_dim") or hidden // heads
    key_value_heads = optional_size(config, "num_key_value_heads") or heads
    if heads % key_value_heads:
        raise ValueError(
            f"num_key_value_heads in the config of model type {config.model_type!r} is {key_value_heads}; allowed: a "
            f"divisor of its num_attention_heads, {heads}"
        )
    intermediate = optional_size(config, *_INTERMEDIATE_NAMES, layer=index) or 4 * hidden  # GPT-2's rule for None
    return LayerShape(
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        value_head_dim=optional_size(config, "v_head_dim") or head_dim,
        intermediate_size=intermediate * (2 if is_reading and getattr(config, "use_double_wide_mlp", False) else 1),
        has_plain_mlp=not _cutoff(config, index),
        has_own_keys=not is_reading,
        has_value_projection=not (getattr(config, "attention_k_eq_v", False) and kind != "sliding_attention"),
    )


def _cutoff(config: Any, index: int) -> float:
    """The part of a layer's gate that is 0 (`activation_sparsity_pattern`)."""
    parts = getattr(config, "activation_sparsity_pattern", None) or ()
    return parts[index] if index < len(parts) else 0.0


def _latent_head_dim(config: Any) -> int | None:
    """Of multi-head latent attention, whose keys have a part that is rotated and one that is not."""
    parts = [optional_size(config, f"qk_{part}_head_dim") for part in ("nope", "rope")]
    return None if None in parts or getattr(config, "qk_head_dim", None) else sum(part or 0 for part in parts)


def _reading_layers(config: Any, num_layers: int) -> range:
    """The last ones, as many as the config says."""
    return range(num_layers - (optional_size(config, "num_kv_shared_layers") or 0), num_layers)

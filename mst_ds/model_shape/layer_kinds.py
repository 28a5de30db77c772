"""The kinds of a config's layers, and the heads of those that are not attention."""

from __future__ import annotations

from typing import Any

from mst_ds.model_shape.sizes import optional_size
from mst_ds.model_shape.state_space import read_state_space

_ATTENTION_LAYERS = frozenset({"full_attention", "attention", "sliding_attention", "chunked_attention"})
_TOKENWISE_LAYERS = frozenset({"mlp", "moe"})
# Heads of layers that are not attention, or channels, which ranks share as they do those of attention.
_MIXER_HEADS = (
    "linear_num_value_heads",
    "linear_num_heads",
    "mamba_n_heads",
    "mamba_num_heads",
    "n_mamba_heads",
    "lru_width",
)


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer, in transformers' words; none where a config does not say."""
    return list(getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ())


def other_layers(config: Any) -> tuple[str, ...]:
    """The kinds of layers that are not attention, such as linear attention, state spaces and convolutions."""
    return tuple(sorted(set(layer_kinds(config)) - _ATTENTION_LAYERS - _TOKENWISE_LAYERS))


def mixer_heads(config: Any, picking: set[str], *, num_attention_heads: int, hidden_size: int) -> tuple[int, bool]:
    """The heads of layers that are not attention, 0 where none are known, and whether a layer of them is worked through
    in chunks: a scan of channels, and a linear attention without heads of its own, take a shard whole.

    Args:
        picking: kinds of layers whose attention is to keys that an indexer picks.
    """
    state_space, others = read_state_space(config), set(other_layers(config))
    if state_space is not None:
        return state_space.heads, state_space.heads < state_space.width
    if (heads := optional_size(config, *_MIXER_HEADS)) is not None:
        return heads, True
    if others and others <= {"conv", *picking}:
        # These have none to divide: ranks hand on a few tokens of a short convolution, and all keys of an indexer.
        return num_attention_heads, True
    if expand := optional_size(config, "mamba_expand"):
        return expand * hidden_size, False
    return num_attention_heads if others == {"linear_attention"} else 0, False

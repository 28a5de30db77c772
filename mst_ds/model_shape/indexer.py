"""The indexers of a config, which pick the keys that each query of attention sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mst_ds.model_shape.sizes import optional_size

# transformers' word for layers whose attention is to picked keys.
INDEXED_ATTENTION = "indexed_attention"


@dataclass(frozen=True)
class IndexerShape:
    """One for each layer, or for some.

    Args:
        top_k: keys that it picks for a query.
        num_heads, head_dim: its own; the keys have one head.
        num_layers: that have one.
        is_shared: layers hand picks on to the next one.
    """

    top_k: int
    num_heads: int
    head_dim: int
    num_layers: int
    is_shared: bool


def read_indexer(config: Any, kinds: list[str]) -> IndexerShape | None:
    """None without one, or with one whose sizes are not known.

    Args:
        kinds: of the layers.
    """
    sizes = [optional_size(config, name) for name in ("index_topk", "index_n_heads", "index_head_dim")]
    if INDEXED_ATTENTION not in kinds or None in sizes:
        return None
    top_k, heads, head_dim = (size or 0 for size in sizes)
    types = getattr(config, "indexer_types", None)
    layers = kinds.count(INDEXED_ATTENTION) if types is None else types.count("full")
    return IndexerShape(top_k, heads, head_dim, layers, is_shared=types is not None)

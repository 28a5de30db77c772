"""Layers that are not attention, on packed documents and on shards: what their convolutions and scans compute."""

from mst_ds.mixers.calls import KNOWN, METHODS, NOT_TRAINED, OPERATORS, WHOLE, with_operators
from mst_ds.mixers.indexer import CACHE, MASK, Indexer, KeptPicks
from mst_ds.mixers.lightning import lightning_attention
from mst_ds.mixers.sequence import MixedSequence

__all__ = [
    "CACHE",
    "KNOWN",
    "MASK",
    "METHODS",
    "NOT_TRAINED",
    "OPERATORS",
    "WHOLE",
    "Indexer",
    "KeptPicks",
    "MixedSequence",
    "lightning_attention",
    "with_operators",
]

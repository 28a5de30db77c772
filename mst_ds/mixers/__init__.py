"""Layers that are not attention, on packed documents and on shards: what their convolutions and scans compute."""

from mst_ds.mixers.calls import KNOWN, NOT_TRAINED, OPERATORS, with_operators
from mst_ds.mixers.indexer import CACHE, MASK, Indexer, KeptPicks
from mst_ds.mixers.sequence import MixedSequence

__all__ = [
    "CACHE",
    "KNOWN",
    "MASK",
    "NOT_TRAINED",
    "OPERATORS",
    "Indexer",
    "KeptPicks",
    "MixedSequence",
    "with_operators",
]

"""Memory terms of several hidden states of a token, which AltUp (arXiv 2301.13310) mixes in every layer.

How many tensors each moment has is measured on fake tensors, with 2, 3 and 4 hidden states, as Gemma 3n has them.
"""

from __future__ import annotations

from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]


def made_of_streams(work: Workload, moment: str) -> Terms:
    """What the decoder makes of the embeddings before the first layer, and of the streams after the last one: each
    other stream by a projection that is scaled to the size of the first."""
    streams = work.shape.residual_streams
    if streams == 1:
        return ()
    tensors = {"forward": 3 * streams - 2, "loss": 5 * streams - 3, "backward": 2 * streams - 1}[moment]
    return (_hidden(work, "residual_streams", tensors),)


def saved_of_streams(work: Workload, layers: int) -> Terms:
    """By each of so many layers, of prediction, correction and what goes beside attention."""
    streams = work.shape.residual_streams
    return (_hidden(work, "saved_residual_streams", 3 * streams + 10, layers),) if streams > 1 else ()


def streams_step(work: Workload, *, backward: bool) -> Terms:
    """While a layer corrects its streams: in a forward with all that it has computed, of which nothing is saved where
    it is computed again."""
    streams = work.shape.residual_streams
    if streams == 1:
        return ()
    return (_hidden(work, "corrected_residual_streams", 8 if backward else 2 * streams + 14),)


def _hidden(work: Workload, name: str, tensors: int, layers: int = 1) -> MemoryTerm:
    return product_term(
        name,
        "device",
        ("layers", layers),
        ("tensors", tensors),
        ("tokens", work.tokens),
        ("hidden_size", work.shape.hidden_size),
        ("bytes", work.zero.dtype_bytes),
    )

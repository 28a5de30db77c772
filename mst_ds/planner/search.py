"""Chooses the chunk counts of a rank: as few as the memory allows, because short chunks cost time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from mst_ds.config import AUTO, Auto
from mst_ds.planner import activations
from mst_ds.planner.mlp import mlp_steps
from mst_ds.planner.phases import layer_phase, loss_phase, rest_of_layer_step
from mst_ds.planner.types import total_bytes
from mst_ds.planner.workload import Workload

# Below this length the matrices of a chunk are too small to keep an accelerator busy.
MIN_CHUNK_TOKENS = 256


def choose_chunks(
    work: Workload, *, device_memory: int, mlp_chunks: int | Auto, loss_chunks: int | Auto
) -> tuple[int, int]:
    """The (mlp_chunks, loss_chunks) of one rank; a count that the user set stays.

    First the fewest chunks with which the MLP, then the loss, no longer makes the peak. Then, where that
    exceeds the device's memory, the fewest that fit; where none fit, the fewest that reach the lowest peak.
    No chunk gets shorter than `MIN_CHUNK_TOKENS`, unless the shard itself is.

    Raises:
        ValueError: the user set more chunks than the shard has tokens.
    """
    most = max(1, work.tokens // MIN_CHUNK_TOKENS)
    mlp = _given("mlp_chunks", mlp_chunks, work) or _fewest(1, most, lambda n: _mlp_is_not_the_peak(work, n))
    loss = _given("loss_chunks", loss_chunks, work) or _fewest(1, most, lambda n: _loss_is_not_the_peak(work, n, mlp))
    if mlp_chunks == AUTO:
        mlp = _fewest_within(device_memory, mlp, most, lambda n: _layer_bytes(work, n))
    if loss_chunks == AUTO:
        loss = _fewest_within(device_memory, loss, most, lambda n: loss_phase(work, n).device_bytes)
    return mlp, loss


def _given(name: str, chunks: int | Auto, work: Workload) -> int | None:
    if chunks == AUTO:
        return None
    if chunks > work.tokens:
        raise ValueError(
            f"{name} is {chunks}, more than the {work.tokens} tokens of a rank (micro batch x shard length); "
            f"allowed: 'auto' or 1 to {work.tokens}"
        )
    return chunks


def _mlp_is_not_the_peak(work: Workload, chunks: int) -> bool:
    return all(
        total_bytes(step.terms) <= total_bytes(rest_of_layer_step(work, backward=backward))
        # Where the unchunked part alone is larger than the rest, more chunks than this gain little.
        or total_bytes(step.chunk) <= total_bytes(step.rest)
        for backward in (False, True)
        for step in mlp_steps(work, chunks, backward=backward)
    )


def _loss_is_not_the_peak(work: Workload, chunks: int, mlp_chunks: int) -> bool:
    logits = total_bytes(activations.loss_logits(work, chunks))
    return loss_phase(work, chunks).device_bytes <= _layer_bytes(work, mlp_chunks) or logits <= total_bytes(
        activations.loss_unchunked(work)
    )


def _layer_bytes(work: Workload, mlp_chunks: int) -> int:
    return max(layer_phase(work, mlp_chunks, backward=backward).device_bytes for backward in (False, True))


def _fewest_within(device_memory: int, low: int, high: int, bytes_with: Callable[[int], int]) -> int:
    reachable = max(device_memory, bytes_with(max(low, high)))
    return _fewest(low, high, lambda n: bytes_with(n) <= reachable)


def _fewest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The first count from `low` to `high` that is enough, else `high`; more chunks stay enough."""
    counts = range(low, high + 1)
    return counts[min(bisect_left(counts, True, key=enough), len(counts) - 1)]

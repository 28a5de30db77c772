"""Chooses what a rank keeps, its groups of heads and its chunk counts: the fastest that fits."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator

from mst_ds.config import AUTO, Auto
from mst_ds.geometry import shard_length
from mst_ds.gpus import DEFAULT_GPU, Gpu
from mst_ds.planner import activations
from mst_ds.planner.cost import step_seconds
from mst_ds.planner.kept import kept_gate_up
from mst_ds.planner.phases import (
    layer_phase,
    loss_phase,
    mlp_moments,
    rest_of_layer_moment,
    step_phases,
)
from mst_ds.planner.types import Phase, total_bytes
from mst_ds.planner.workload import Workload
from mst_ds.settings import MstConfig, candidates

# Below this length the matrices of a chunk are too small to keep an accelerator busy.
MIN_CHUNK_TOKENS = 256
# Below this length a GPU reads and writes a weight gradient's sum for longer than it computes what is added. Chunks are
# shorter only where memory demands it.
CHUNK_TOKENS_OF_GPU = 2048


def preferred_chunk_tokens(is_known_gpu: bool) -> int:
    """See `choose_chunks`."""
    return CHUNK_TOKENS_OF_GPU if is_known_gpu else MIN_CHUNK_TOKENS


def choose_settings(
    work: Workload,
    mst: MstConfig,
    *,
    device_memory: int,
    host_memory: int | None,
    gpu: Gpu = DEFAULT_GPU,
    preferred_chunk_tokens: int = MIN_CHUNK_TOKENS,
    least_device_memory: int | None = None,
) -> Workload:
    """`work` with the settings that fit and are predicted fastest; of equally fast ones those that `candidates` has
    first, with the fewest groups of heads.

    Where nothing fits it is those with the lowest peak, of equal ones those with recompute. What the user set stays;
    kept attention or offload that the user asks for means recompute.

    Args:
        work: whose chunk counts, groups of heads and knobs with `choices` are not read.
        device_memory: bytes of this rank's device, which its chunk counts follow from.
        host_memory: bytes of the host that this rank may use; None: not known, and nothing is kept there by choice.
        gpu: whose rates predict.
        preferred_chunk_tokens: as `choose_chunks` has it.
        least_device_memory: bytes of the smallest device. Everything but chunk counts is chosen for it, because the
            ranks would wait for each other if they differed in that. None: all are like this rank's.
    """
    least = device_memory if least_device_memory is None else least_device_memory
    unchunked_ones = list(_unchunked_candidates(work, mst))

    def chunked(unchunked: Workload) -> Workload:
        streamed = _with_layer_chunks(unchunked, mst, preferred_chunk_tokens, least)
        return _with_chunks(streamed, mst, least, preferred_chunk_tokens)

    best: tuple[float, int, Workload] | None = None
    # In one chunk of everything none takes longer than in more, so that a search from the fastest on can end early.
    at_least = sorted((step_seconds(each, gpu), rank) for rank, each in enumerate(unchunked_ones))
    for least_seconds, rank in at_least:
        if best is not None and least_seconds > best[0]:
            break
        if not _can_fit(unchunked_ones[rank], mst, least, host_memory):
            continue
        candidate = chunked(unchunked_ones[rank])
        phases = step_phases(candidate)
        if _is_within(phases, least) and _host_has_room(phases, host_memory):
            # Of equally fast ones the first; no two have the same rank.
            found = step_seconds(candidate, gpu), rank, candidate
            best = found if best is None else min(best, found)
    chosen = _lowest_peak(map(chunked, unchunked_ones), mst, host_memory) if best is None else best[-1]
    return _with_chunks(chosen, mst, device_memory, preferred_chunk_tokens)


def _lowest_peak(candidates: Iterable[Workload], mst: MstConfig, host_memory: int | None) -> Workload:
    """Of equal ones those with recompute, without gate and up. What is kept on the device is always a candidate."""
    found = []
    for rank, candidate in enumerate(candidates):
        phases, settings = step_phases(candidate), candidate.settings
        if _may_offload(candidate, mst, phases, host_memory):
            peak = max(phase.device_bytes for phase in phases)
            found.append((peak, not settings.recompute, settings.keep_mlp, rank, candidate))
    return min(found)[-1]


def _with_chunks(work: Workload, mst: MstConfig, device_memory: int, preferred_tokens: int) -> Workload:
    mlp_chunks, loss_chunks = choose_chunks(
        work,
        device_memory=device_memory,
        mlp_chunks=mst.get("mlp_chunks"),
        loss_chunks=mst.get("loss_chunks"),
        preferred_tokens=preferred_tokens,
    )
    return work.with_settings(mlp_chunks=mlp_chunks, loss_chunks=loss_chunks)


def _with_layer_chunks(work: Workload, mst: MstConfig, preferred_tokens: int, device_memory: int) -> Workload:
    """`work` with as many chunks of a layer as its ranks agree on.

    The fewest with which layers fit on the least device, no shorter than `preferred_tokens` if that is enough; where
    none fit, the fewest that reach the lowest peak.
    """
    length = shard_length(work.seq_len, work.sp_size)
    if not _may_stream(work):
        return work.with_settings(layer_chunks=1)
    given = _given("layer_chunks", mst.get("layer_chunks"), length, "a shard")
    if given is not None:
        return work.with_settings(layer_chunks=given)

    bytes_with = functools.cache(functools.partial(_bytes_with_layer_chunks, work, mst))
    most, some = (max(1, length // tokens) for tokens in (MIN_CHUNK_TOKENS, preferred_tokens))
    if bytes_with(1) <= device_memory or most == 1:
        return work.with_settings(layer_chunks=1)
    if some > 1 and bytes_with(some) <= device_memory:
        most = some
    # With two chunks keys and values are kept, which may be more than one chunk alone needs.
    count = _fewest_within(device_memory, 2, most, bytes_with)
    if min(bytes_with(1), bytes_with(count)) > device_memory and bytes_with(1) <= bytes_with(count):
        count = 1
    return work.with_settings(layer_chunks=count)


def _bytes_with_layer_chunks(work: Workload, mst: MstConfig, chunks: int) -> int:
    """Of layers and loss, in the most chunks that they may have then."""
    settings = _with_most_chunks(work.with_settings(layer_chunks=chunks), mst)
    of_loss = loss_phase(settings, settings.settings.loss_chunks).device_bytes
    return max(of_loss, _layer_bytes(settings, settings.settings.mlp_chunks))


def _layers_can_fit(work: Workload, mst: MstConfig, device_memory: int) -> bool:
    """Whether some count of a layer's chunks that may be chosen fits: one, or the most; found without the search."""
    if not _may_stream(work) or mst.get("layer_chunks") != AUTO:
        return True  # nothing is searched
    most = max(1, shard_length(work.seq_len, work.sp_size) // MIN_CHUNK_TOKENS)
    return any(_bytes_with_layer_chunks(work, mst, chunks) <= device_memory for chunks in (most, 1))


def _may_stream(work: Workload) -> bool:
    """Whether layers that are computed again can have several chunks."""
    return work.settings.recompute and "layer_chunks" not in work.without_effect


def can_fit(work: Workload, mst: MstConfig, *, device_memory: int, host_memory: int | None) -> bool:
    """Whether `choose_settings` would find settings that fit."""
    candidates = _unchunked_candidates(work, mst)
    return any(_can_fit(candidate, mst, device_memory, host_memory) for candidate in candidates)


def _can_fit(unchunked: Workload, mst: MstConfig, device_memory: int, host_memory: int | None) -> bool:
    """Then it also does with the most chunks that may be chosen within a layer's chunks."""
    if not _layers_can_fit(unchunked, mst, device_memory):
        return False
    streamed = _with_layer_chunks(unchunked, mst, MIN_CHUNK_TOKENS, device_memory)
    candidate = _with_most_chunks(streamed, mst)
    phases = step_phases(candidate)
    may_offload = _may_offload(candidate, mst, phases, host_memory)
    return _is_within(phases, device_memory) and may_offload and _host_has_room(phases, host_memory)


def _is_within(phases: tuple[Phase, ...], device_memory: int) -> bool:
    return max(phase.device_bytes for phase in phases) <= device_memory


def _with_most_chunks(work: Workload, mst: MstConfig) -> Workload:
    most = {
        "mlp_chunks": max(1, work.of_chunk.tokens // MIN_CHUNK_TOKENS),
        "loss_chunks": max(1, work.tokens // MIN_CHUNK_TOKENS),
    }
    counts = {name: mst.get(name) for name in most}
    return work.with_settings(
        **{name: most[name] if chunks == AUTO else min(chunks, work.tokens) for name, chunks in counts.items()}
    )


def _may_offload(work: Workload, mst: MstConfig, phases: tuple[Phase, ...], host_memory: int | None) -> bool:
    """Whether what this keeps on the host is what the user asks for, or has room there for certain."""
    if not work.settings.offload_activations or mst.get("offload_activations") != AUTO:
        return True
    return host_memory is not None and _host_has_room(phases, host_memory)


def _host_has_room(phases: tuple[Phase, ...], host_memory: int | None) -> bool:
    return host_memory is None or max(phase.host_bytes for phase in phases) <= host_memory


def _unchunked_candidates(work: Workload, mst: MstConfig) -> Iterator[Workload]:
    work = work.without_idle_windows()
    given = {"layer_chunks": 1, **mst.given, **work.without_effect}
    for chosen in candidates(given):
        if chosen["offload_activations"] and chosen["keep_mlp"] and mst.get("keep_mlp") == AUTO:
            continue  # several times the host's memory for little time: for the user to decide
        kept = work.with_settings(**chosen, layer_chunks=given["layer_chunks"])
        for count in _head_groups(kept, mst.get("head_groups")):
            yield kept.with_settings(head_groups=count)


def _head_groups(work: Workload, given: int | Auto) -> list[int]:
    """The counts to try, from the fewest on with which attention no longer makes the peak."""
    if given != AUTO:
        return [len(work.with_settings(head_groups=given).heads.groups)]
    counts = work.heads.group_counts
    enough = (
        index for index, count in enumerate(counts) if _attention_is_not_the_peak(work.with_settings(head_groups=count))
    )
    return counts[next(enough, len(counts) - 1) :]


def _attention_is_not_the_peak(work: Workload) -> bool:
    """Whether MLPs in the shortest chunks need as much as attention."""
    most_chunks = max(1, work.of_chunk.tokens // MIN_CHUNK_TOKENS)
    return all(
        total_bytes(rest_of_layer_moment(work, backward=backward))
        <= max(total_bytes(step.terms) for step in mlp_moments(work, most_chunks, backward=backward))
        for backward in (False, True)
    )


def choose_chunks(
    work: Workload,
    *,
    device_memory: int,
    mlp_chunks: int | Auto,
    loss_chunks: int | Auto,
    preferred_tokens: int = MIN_CHUNK_TOKENS,
) -> tuple[int, int]:
    """The (mlp_chunks, loss_chunks) of one rank; a count that the user set stays.

    First the fewest chunks with which the MLP, then the loss, no longer makes the peak, none shorter than
    `preferred_tokens`. Then, where that exceeds the device's memory, the fewest that fit; where none fit, the fewest
    that reach the lowest peak. No chunk gets shorter than `MIN_CHUNK_TOKENS`, unless the shard itself is.

    Raises:
        ValueError: the user set more chunks than the shard has tokens.
    """
    most, some = (max(1, work.tokens // tokens) for tokens in (MIN_CHUNK_TOKENS, preferred_tokens))
    most_mlp, some_mlp = (max(1, work.of_chunk.tokens // tokens) for tokens in (MIN_CHUNK_TOKENS, preferred_tokens))
    rank = "a rank (micro batch x shard length)"
    mlp = _given("mlp_chunks", mlp_chunks, work.tokens, rank)
    mlp = mlp or _fewest(1, some_mlp, functools.partial(_mlp_is_not_the_peak, work))
    loss = _given("loss_chunks", loss_chunks, work.tokens, rank)
    loss = loss or _fewest(1, some, functools.partial(_loss_is_not_the_peak, work, mlp))
    if mlp_chunks == AUTO:
        mlp = _fewest_within(device_memory, mlp, most_mlp, lambda n: _layer_bytes(work, n))
    if loss_chunks == AUTO:
        loss = _fewest_within(device_memory, loss, most, lambda n: loss_phase(work, n).device_bytes)
    return mlp, loss


def _given(name: str, chunks: int | Auto, tokens: int, of_what: str) -> int | None:
    if chunks == AUTO:
        return None
    if chunks > tokens:
        raise ValueError(
            f"{name} is {chunks}, more than the {tokens} tokens of {of_what}; allowed: 'auto' or 1 to {tokens}"
        )
    return chunks


def _mlp_is_not_the_peak(work: Workload, chunks: int) -> bool:
    return all(
        total_bytes(step.terms) <= total_bytes(rest_of_layer_moment(work, backward=backward))
        # Where the unchunked part alone is larger than the rest, more chunks than this gain little.
        or total_bytes(step.chunk) <= total_bytes(step.rest) + _kept_by_last_mlp(work)
        for backward in (False, True)
        for step in mlp_moments(work, chunks, backward=backward)
    )


def _kept_by_last_mlp(work: Workload) -> int:
    return total_bytes(kept_gate_up(work)) - total_bytes(kept_gate_up(work, of_last_part=False))


def _loss_is_not_the_peak(work: Workload, mlp_chunks: int, chunks: int) -> bool:
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

"""Chooses what a rank keeps, its groups of heads and its chunk counts: the fastest that fits."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Callable, Iterator
from operator import itemgetter

from mst_ds.config import AUTO, Auto
from mst_ds.geometry import shard_length
from mst_ds.gpus import DEFAULT_GPU, Gpu
from mst_ds.planner import activations
from mst_ds.planner.cost import step_seconds
from mst_ds.planner.kept import kept_gate_up, kept_on_host
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

    Where nothing fits it is those that fit the device and lack least of the host, or else those with the lowest peak,
    of equal ones those with recompute. What the user set stays; kept attention or offload that the user asks for means
    recompute.

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
    unchunked = list(_unchunked_candidates(work, mst))
    # More chunks only take longer: none is faster than it would be in one chunk of everything.
    bounds = [
        step_seconds(candidate.with_settings(layer_chunks=1, mlp_chunks=1, loss_chunks=1), gpu)
        for candidate in unchunked
    ]
    found: list[tuple[float, int, Workload]] = []
    for index in sorted(range(len(unchunked)), key=bounds.__getitem__):
        if found and bounds[index] > min(found)[0]:
            break
        if not _can_fit(unchunked[index], mst, least, host_memory):
            continue
        streamed = _with_layer_chunks(unchunked[index], mst, preferred_chunk_tokens, least)
        candidate = _with_chunks(streamed, mst, least, preferred_chunk_tokens)
        phases = step_phases(candidate)
        if _fits(candidate, mst, phases, least, host_memory):
            found.append((step_seconds(candidate, gpu), index, candidate))
    # Of equally fast ones the first of `candidates`.
    if found:
        best = min(found)[2]
    else:
        nearest = _nearest(unchunked, mst, least, host_memory)
        best = _with_layer_chunks(nearest, mst, preferred_chunk_tokens, least)
    return _with_chunks(best, mst, device_memory, preferred_chunk_tokens)


def _nearest(unchunked: list[Workload], mst: MstConfig, device_memory: int, host_memory: int | None) -> Workload:
    """Where nothing fits: what fits the device and lacks least of the host, else what the host has room for and has the
    lowest peak on the device; in as many chunks as help most."""
    others: list[tuple[tuple[bool, int, bool, bool], Workload]] = []
    for work in unchunked:
        most = _most_layer_chunks(work) if _may_stream(work) else 1
        given = mst.get("layer_chunks")
        counts = {1, most} if given == AUTO else {work.settings.layer_chunks}
        tried = [step_phases(_with_most_chunks(work.with_settings(layer_chunks=count), mst)) for count in counts]
        phases = min(tried, key=_peak)
        lacks_host = host_memory is not None and _peak(phases) <= device_memory
        if lacks_host or _may_offload(work, mst, phases, host_memory):
            needed = max(phase.host_bytes for phase in phases) if lacks_host else _peak(phases)
            others.append(((not lacks_host, needed, not work.settings.recompute, work.settings.keep_mlp), work))
    # Python's min takes the first of equals. What is kept on the device is always a candidate.
    return min(others, key=itemgetter(0))[1]


def _peak(phases: tuple[Phase, ...]) -> int:
    return max(phase.device_bytes for phase in phases)


def _can_fit(work: Workload, mst: MstConfig, device_memory: int, host_memory: int | None) -> bool:
    """False for what does not fit in any number of chunks, as far as is found without a search."""
    if work.settings.offload_activations and mst.get("offload_activations") == AUTO and host_memory is None:
        return False
    return _host_can_have_room(work, host_memory) and _layers_can_fit(work, mst, device_memory)


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

    def bytes_with(chunks: int) -> int:
        return max(_bytes_with_layer_chunks(work, mst, chunks))

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


def _bytes_with_layer_chunks(work: Workload, mst: MstConfig, chunks: int) -> Iterator[int]:
    """Of the loss and of layers, in the most chunks that they may have then; what is cheap to know first."""
    work = work.with_settings(layer_chunks=chunks)
    mlp_chunks, loss_chunks = _most_chunks(work, mst)
    yield loss_phase(work, loss_chunks).device_bytes
    for backward in (True, False):
        yield layer_phase(work, mlp_chunks, backward=backward).device_bytes


def _layers_can_fit(work: Workload, mst: MstConfig, device_memory: int) -> bool:
    """Whether some count of a layer's chunks that may be chosen fits: one, or the most; found without the search."""
    if not _may_stream(work) or mst.get("layer_chunks") != AUTO:
        return True  # nothing is searched
    return any(
        all(needed <= device_memory for needed in _bytes_with_layer_chunks(work, mst, chunks))
        for chunks in (_most_layer_chunks(work), 1)
    )


def _most_layer_chunks(work: Workload) -> int:
    return max(1, shard_length(work.seq_len, work.sp_size) // MIN_CHUNK_TOKENS)


def _may_stream(work: Workload) -> bool:
    """Whether layers that are computed again can have several chunks."""
    return work.settings.recompute and "layer_chunks" not in work.without_effect


def can_fit(work: Workload, mst: MstConfig, *, device_memory: int, host_memory: int | None) -> bool:
    """Whether `choose_settings` would find settings that fit: then they also do with the most chunks it may choose
    within a layer's chunks."""
    # The last ones keep least on the device.
    for unchunked in _unchunked_candidates(work, mst, reverse=True):
        if not _can_fit(unchunked, mst, device_memory, host_memory):
            continue
        for streamed in _streamed(unchunked, mst, device_memory):
            candidate = _with_most_chunks(streamed, mst)
            phases = step_phases(candidate)
            if _fits(candidate, mst, phases, device_memory, host_memory):
                return True
    return False


def _streamed(work: Workload, mst: MstConfig, device_memory: int) -> Iterator[Workload]:
    """In the fewest chunks of a layer that fit the device; where layers keep nothing on the host, of which pieces that
    are longer may need more, first in the most, which need no search."""
    if _may_stream(work) and mst.get("layer_chunks") == AUTO and not work.settings.offload_activations:
        yield work.with_settings(layer_chunks=_most_layer_chunks(work))
    yield _with_layer_chunks(work, mst, MIN_CHUNK_TOKENS, device_memory)


def _host_can_have_room(work: Workload, host_memory: int | None) -> bool:
    """Whether what layers keep there fits in one chunk of them, without what pinned memory takes beyond it: more chunks
    keep no less."""
    kept = kept_on_host(work.with_settings(layer_chunks=1))
    return host_memory is None or total_bytes(term for term in kept if term.kind == "activation") <= host_memory


def _with_most_chunks(work: Workload, mst: MstConfig) -> Workload:
    mlp_chunks, loss_chunks = _most_chunks(work, mst)
    return work.with_settings(mlp_chunks=mlp_chunks, loss_chunks=loss_chunks)


def _most_chunks(work: Workload, mst: MstConfig) -> tuple[int, int]:
    """Of the MLP in a chunk of the layer, and of the loss."""
    given = mst.get("mlp_chunks"), mst.get("loss_chunks")
    tokens = work.of_chunk.tokens, work.tokens
    mlp, loss = (
        max(1, most // MIN_CHUNK_TOKENS) if chunks == AUTO else min(chunks, work.tokens)
        for chunks, most in zip(given, tokens, strict=True)
    )
    return mlp, loss


def _fits(
    work: Workload, mst: MstConfig, phases: tuple[Phase, ...], device_memory: int, host_memory: int | None
) -> bool:
    is_allowed = _may_offload(work, mst, phases, host_memory) and _host_has_room(phases, host_memory)
    return is_allowed and _peak(phases) <= device_memory


def _may_offload(work: Workload, mst: MstConfig, phases: tuple[Phase, ...], host_memory: int | None) -> bool:
    """Whether what this keeps on the host is what the user asks for, or has room there for certain."""
    if not work.settings.offload_activations or mst.get("offload_activations") != AUTO:
        return True
    return host_memory is not None and _host_has_room(phases, host_memory)


def _host_has_room(phases: tuple[Phase, ...], host_memory: int | None) -> bool:
    return host_memory is None or max(phase.host_bytes for phase in phases) <= host_memory


def _unchunked_candidates(work: Workload, mst: MstConfig, *, reverse: bool = False) -> Iterator[Workload]:
    work = work.without_idle_windows.with_settings(mlp_chunks=1, loss_chunks=1)
    given = {"layer_chunks": 1, **mst.given, **work.without_effect}
    in_order = list(candidates(given))
    for chosen in reversed(in_order) if reverse else in_order:
        if chosen["offload_activations"] and chosen["keep_mlp"] and mst.get("keep_mlp") == AUTO:
            continue  # several times the host's memory for little time: for the user to decide
        kept = work.with_settings(**chosen, layer_chunks=given["layer_chunks"])
        counts = _head_groups(kept, mst.get("head_groups"))
        for count in reversed(counts) if reverse else counts:
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
    if bytes_with(low) <= device_memory:
        return low
    reachable = max(device_memory, bytes_with(max(low, high)))
    return _fewest(low, high, lambda n: bytes_with(n) <= reachable)


def _fewest(low: int, high: int, enough: Callable[[int], bool]) -> int:
    """The first count from `low` to `high` that is enough, else `high`; more chunks stay enough.

    Few are enough mostly, so it looks near `low` first.
    """
    reach, width = low, 1
    while reach < high and not enough(reach):
        low, reach, width = reach + 1, min(reach + width, high), 2 * width
    return low + bisect_left(range(low, reach), True, key=enough)

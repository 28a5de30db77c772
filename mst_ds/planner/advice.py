"""What to change where a plan does not fit: for each kind of change the smallest that does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

from mst_ds.geometry import ceil_divide
from mst_ds.planner.plan import longest_of_request
from mst_ds.planner.request import Request

Value: TypeAlias = int | str | bool

_MOST_TIMES_THE_NODES = 256


@dataclass(frozen=True)
class Change:
    """Settings by name, as they stand in the DeepSpeed JSON or among the planner's flags, that together make it fit."""

    settings: tuple[tuple[str, Value], ...]

    def __str__(self) -> str:
        return " and ".join(f"{name} {str(value).lower()}" for name, value in self.settings)


def changes_that_fit(request: Request) -> tuple[Change, ...]:
    """One change of each kind that helps, from what is nearest at hand on: more ranks to a sequence, the host's memory,
    a higher ZeRO stage, more nodes, a shorter sequence. Empty where nothing helps."""
    found = (_larger_sp_size, _offloaded_activations, _higher_stage, _offloaded_states, _more_nodes, _shorter_sequence)
    changes = (next((Change(change) for change in kind(request)), None) for kind in found)
    return tuple(change for change in changes if change is not None)


_Changes: TypeAlias = Iterator[tuple[tuple[str, Value], ...]]


def _larger_sp_size(request: Request) -> _Changes:
    for sp_size in _sp_sizes(request, request.topology.world_size):
        if sp_size > request.work.sp_size and request.fits(sp_size=sp_size):
            yield (("sp_size", sp_size),)


def _offloaded_activations(request: Request) -> _Changes:
    mst = request.mst
    if mst.get("offload_activations") is not True and mst.get("recompute") is not False:
        offloaded = replace(request, mst=replace(mst, given={**mst.given, "offload_activations": True}))
        if offloaded.fits():
            yield (("offload_activations", True),)


def _higher_stage(request: Request) -> _Changes:
    for stage in range(request.work.zero.stage + 1, 4):
        if request.fits(zero=replace(request.work.zero, stage=stage)):
            yield (("stage", stage),)


def _offloaded_states(request: Request) -> _Changes:
    zero = request.work.zero
    if zero.stage == 0:
        return
    if zero.optimizer_offload == "none" and request.fits(zero=replace(zero, optimizer_offload="cpu")):
        yield (("offload_optimizer", "cpu"),)
    both = replace(zero, optimizer_offload="cpu", param_offload="cpu")
    if zero.stage == 3 and zero.param_offload == "none" and request.fits(zero=both):
        yield (("offload_optimizer", "cpu"), ("offload_param", "cpu"))


def _more_nodes(request: Request) -> _Changes:
    """With the ranks to a sequence as they are, or else as many as it takes."""
    ranks, zero, work = request.topology.world_size, request.work.zero, request.work
    nodes = ceil_divide(ranks, work.ranks_per_node)
    times = 2
    while times <= _MOST_TIMES_THE_NODES:
        more = replace(zero, dp_world_size=times * zero.dp_world_size)
        for sp_size in _sp_sizes(request, times * ranks):
            if sp_size >= work.sp_size and request.fits(zero=more, sp_size=sp_size):
                changed = (("sp_size", sp_size),) if sp_size != work.sp_size else ()
                yield (("num_nodes", times * nodes), *changed)
        times *= 2


def _shorter_sequence(request: Request) -> _Changes:
    longest = longest_of_request(request)
    if 0 < longest < request.work.seq_len:
        yield (("seq_len", longest),)


def _sp_sizes(request: Request, world_size: int) -> list[int]:
    most = request.work.shape.max_sp_size
    return [size for size in range(1, min(most, world_size) + 1) if world_size % size == 0]

"""What to change where a plan does not fit, for each kind of change the smallest that does; and what makes a plan that
fits faster or cheaper."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mst_ds.answers import variants
from mst_ds.answers.verdict import seconds_text
from mst_ds.config import GIB
from mst_ds.geometry import ceil_divide
from mst_ds.gpus import known_gpus
from mst_ds.planner import nvme
from mst_ds.planner.plan import longest_of_request, plan_of_request
from mst_ds.planner.request import Request
from mst_ds.planner.types import Plan

Value: TypeAlias = int | str | bool
_Settings: TypeAlias = tuple[tuple[str, Value], ...]

_MOST_TIMES_THE_NODES = 256
# Of the adapters that are offered, as most recipes have it.
_LORA_RANK = 16
# What is no faster or cheaper than by this factor is not worth a change.
_WORTH = 1.02


@dataclass(frozen=True)
class Change:
    """Settings by name, as they stand in the DeepSpeed JSON or among the planner's flags, and the plan with them."""

    settings: _Settings
    plan: Plan

    def __str__(self) -> str:
        return " and ".join(f"{name} {str(value).lower()}" for name, value in self.settings)

    @property
    def brings(self) -> str:
        """What the plan with them needs, and its pace."""
        plan = self.plan
        words = [f"{plan.peak_bytes / GIB:.1f} of {plan.device_memory / GIB:.1f} GiB of the device"]
        if plan.host_bytes:
            words.append(f"{plan.host_bytes / GIB:.1f} GiB of the host a rank")
        if plan.predicted_step_seconds is not None:
            words.append(
                f"{seconds_text(plan.predicted_step_seconds)} s a step, {plan.tokens_per_second:,.0f} tokens/s"
            )
        return ", ".join(words)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        plan = self.plan
        return {
            "settings": dict(self.settings),
            "fits": plan.fits,
            "peak_bytes": plan.peak_bytes,
            "host_bytes": plan.host_bytes,
            "predicted_step_seconds": plan.predicted_step_seconds,
            "tokens_per_second": plan.tokens_per_second,
        }


_Changes: TypeAlias = Iterator[tuple[_Settings, Request]]


def changes_that_fit(request: Request) -> tuple[Change, ...]:
    """One change of each kind that helps, from what is nearest at hand on: more ranks to a sequence, the host's memory,
    a higher ZeRO stage, states elsewhere, a smaller micro-batch, adapters, more nodes, another GPU, a shorter sequence.
    Empty where nothing helps."""
    kinds: tuple[Callable[[Request], _Changes], ...] = (
        _larger_sp_size,
        _offloaded_activations,
        _more_host_memory,
        _higher_stage,
        _offloaded_states,
        _states_on_nvme,
        _smaller_micro_batch,
        _adapters,
        _more_nodes,
        _another_gpu,
        _shorter_sequence,
    )
    found = (next(((names, changed) for names, changed in kind(request) if changed.fits()), None) for kind in kinds)
    return tuple(Change(names, plan_of_request(changed, has_choices=False)) for names, changed in filter(None, found))


def _larger_sp_size(request: Request) -> _Changes:
    for sp_size in variants.sp_sizes(request, request.topology.world_size):
        if sp_size > request.work.sp_size:
            yield (("sp_size", sp_size),), request.with_sp_size(sp_size)


def _offloaded_activations(request: Request) -> _Changes:
    mst = request.mst
    if mst.get("offload_activations") is not True and mst.get("recompute") is not False:
        yield (("offload_activations", True),), variants.with_offloaded_activations(request)


def _more_host_memory(request: Request) -> _Changes:
    """The least that is enough, in whole GiB of a node."""
    nearest = request if request.host_memory is not None else replace(request, host_memory=0)
    plan = plan_of_request(nearest, has_choices=False)
    if not plan.fits and plan.peak_bytes <= plan.device_memory:
        yield _with_host(request, plan)


def _with_host(request: Request, plan: Plan) -> tuple[_Settings, Request]:
    """A host that holds the plan."""
    ranks = min(request.work.ranks_per_node, request.topology.world_size)
    gib = ceil_divide(ranks * plan.host_bytes, GIB)
    return (("host_memory_gib", gib),), replace(request, host_memory=gib * GIB // ranks)


def _higher_stage(request: Request) -> _Changes:
    for stage in range(request.work.zero.stage + 1, 4):
        yield (("stage", stage),), variants.with_states(request, stage=stage)


def _offloaded_states(request: Request) -> _Changes:
    zero = request.work.zero
    if zero.stage == 0 or not zero.optimizer_may_leave:
        return
    if zero.optimizer_offload == "none":
        yield (("offload_optimizer", "cpu"),), variants.with_states(request, optimizer="cpu")
    if zero.stage == 3 and zero.param_offload == "none":
        both = variants.with_states(request, optimizer="cpu", parameters="cpu")
        yield (("offload_optimizer", "cpu"), ("offload_param", "cpu")), both


def _states_on_nvme(request: Request) -> _Changes:
    """DeepSpeed has files for states that stage 3 shards alone."""
    zero = request.work.zero
    if zero.stage != 3 or not zero.optimizer_may_leave:
        return
    if zero.optimizer_offload != "nvme":
        yield from _if_taken((("offload_optimizer", "nvme"),), variants.with_states(request, optimizer="nvme"))
    if zero.param_offload != "nvme":
        both = variants.with_states(request, optimizer="nvme", parameters="nvme")
        yield from _if_taken((("offload_optimizer", "nvme"), ("offload_param", "nvme")), both)


def _if_taken(names: _Settings, changed: Request) -> _Changes:
    """Nothing, where the JSON's buffers on the way to NVMe are refused."""
    with suppress(ValueError):
        nvme.require_buffers(changed.work)
        yield names, changed


def _smaller_micro_batch(request: Request) -> _Changes:
    for sequences in range(request.work.zero.micro_batch_size - 1, 0, -1):
        changed = variants.with_micro_batch(request, sequences)
        if changed is None:
            continue
        accumulation = changed.work.zero.gradient_accumulation_steps
        names = ("per_device_train_batch_size", sequences), ("gradient_accumulation_steps", accumulation)
        yield names, changed


def _adapters(request: Request) -> _Changes:
    changed = variants.with_lora(request, _LORA_RANK)
    if changed is not None:
        yield (("lora_r", _LORA_RANK),), changed


def _more_nodes(request: Request) -> _Changes:
    """With the ranks to a sequence as they are, or else as many as it takes."""
    nodes, sp_now = variants.nodes_of(request), request.work.sp_size
    times = 2
    while times <= _MOST_TIMES_THE_NODES:
        more = times * nodes
        for sp_size in variants.sp_sizes(request, more * request.work.ranks_per_node):
            if sp_size >= sp_now:
                changed = (("sp_size", sp_size),) if sp_size != sp_now else ()
                yield (("num_nodes", more), *changed), variants.with_nodes(request, more, sp_size)
        times *= 2


def _another_gpu(request: Request) -> _Changes:
    """The smallest that fits, of equal ones the slowest."""
    for gpu in sorted(known_gpus(), key=lambda gpu: (gpu.memory, gpu.flops)):
        if gpu.memory > request.least_device_memory:
            yield (("gpu", gpu.name),), variants.with_gpu(request, gpu)


def _shorter_sequence(request: Request) -> _Changes:
    longest = longest_of_request(request)
    if 0 < longest < request.work.seq_len:
        yield (("seq_len", longest),), request.with_length(longest)


def changes_that_help(request: Request, plan: Plan) -> tuple[Change, ...]:
    """For a plan that fits, one change of each kind with which a token takes less time or fewer GPU-hours: other ranks
    to a sequence, states on the device, a lower ZeRO stage, a host's memory that is not given, fewer nodes. Empty where
    times are not known."""
    if plan.tokens_per_second is None:
        return ()
    kinds = (_other_sp_sizes, _states_on_the_device, _lower_stages, _known_host, _fewer_nodes)
    best = (_most_economic(kind(request), plan) for kind in kinds)
    return tuple(change for change in best if change is not None)


def _most_economic(changes: _Changes, plan: Plan) -> Change | None:
    planned = (
        Change(names, plan_of_request(changed, has_choices=False)) for names, changed in changes if changed.fits()
    )
    better = [change for change in planned if _pace_of_a_gpu(change.plan) > _WORTH * _pace_of_a_gpu(plan)]
    return max(better, key=lambda change: _pace_of_a_gpu(change.plan), default=None)


def _pace_of_a_gpu(plan: Plan) -> float:
    return (plan.tokens_per_second or 0) / plan.topology.world_size


def _other_sp_sizes(request: Request) -> _Changes:
    for sp_size in variants.sp_sizes(request, request.topology.world_size):
        if sp_size != request.work.sp_size:
            yield (("sp_size", sp_size),), request.with_sp_size(sp_size)


def _states_on_the_device(request: Request) -> _Changes:
    zero = request.work.zero
    if zero.param_offload != "none":
        names = ("offload_optimizer", "none"), ("offload_param", "none")
        yield names, variants.with_states(request, optimizer="none", parameters="none")
    elif zero.optimizer_offload != "none":
        yield (("offload_optimizer", "none"),), variants.with_states(request, optimizer="none")


def _lower_stages(request: Request) -> _Changes:
    zero = request.work.zero
    lowest = variants.lowest_stage(request) if zero.optimizer_offload == "none" else 1
    for stage in range(lowest, zero.stage if zero.param_offload == "none" else lowest):
        yield (("stage", stage),), variants.with_states(request, stage=stage)


def _known_host(request: Request) -> _Changes:
    """With as much of a host as the fastest plan keeps there."""
    if request.host_memory is None:
        yield _with_host(request, plan_of_request(variants.with_endless_host(request), has_choices=False))


def _fewer_nodes(request: Request) -> _Changes:
    for nodes, changed in variants.fewer_nodes(request):
        yield (("num_nodes", nodes),), changed

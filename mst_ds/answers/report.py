"""A plan and an answer as people read them."""

from __future__ import annotations

from rich.table import Table

from mst_ds.answers.answer import Answer
from mst_ds.answers.verdict import seconds_text
from mst_ds.config import GIB
from mst_ds.model_shape import ModelShape
from mst_ds.planner.plan import LENGTH_STEP
from mst_ds.planner.types import Plan

_SHOWN_TERMS = 3


def answer_lines(answer: Answer) -> list[str]:
    """What is asked first: whether it fits and what limits it, and what it takes."""
    plan, cost = answer.plan, answer.cost
    if plan.fits:
        first = f"fits; fullest is the {answer.limit}"
    else:
        first = f"does NOT fit; the limit is the {answer.limit}"
    if cost is None or plan.predicted_step_seconds is None or answer.trust is None:
        return [first, "no time is predicted, as rates are not known: --gpu H100 or another's name, or --rates FILE"]
    seconds = seconds_text(plan.predicted_step_seconds)
    pace = f"{cost.tokens_per_second:,.0f} tokens/s of all ranks, {seconds} s a step; {cost}"
    reference = answer.reference
    before = (
        [] if reference is None else [f"before the first step the reference, where no token is read twice: {reference}"]
    )
    return [first, pace if plan.fits else f"if it fitted: {pace}", *before, answer.trust]


def advice_lines(answer: Answer) -> list[str]:
    """What to know beside the plan: the longest length, and what to change."""
    plan, request = answer.plan, answer.request
    lines = [*_of_host(answer), *([] if answer.warning is None else [answer.warning])]
    lines.append(longest_line(request.work.shape, answer.longest))
    if not answer.changes:
        return lines if plan.fits else [*lines, "to make it fit: no single change is enough"]
    lines.append("faster or cheaper:" if plan.fits else "to make it fit, one of:")
    return lines + [f"  {change}: {change.brings}" for change in answer.changes]


def longest_line(shape: ModelShape, longest: int) -> str:
    if not longest:
        return "no sequence fits"
    in_thousands = f" ({longest // LENGTH_STEP}K)" if longest % LENGTH_STEP == 0 else ""
    return f"longest sequence that fits: {longest} tokens{in_thousands}{positions(shape, longest)}"


def positions(shape: ModelShape, longest: int) -> str:
    """What memory does not say of the longest sequence."""
    if longest == shape.fixed_positions:
        return "; the model has no more positions"
    if shape.rotary_positions is not None and longest > shape.rotary_positions:
        return f"; by memory alone, the model's config knows {shape.rotary_positions} positions"
    return ""


def _of_host(answer: Answer) -> list[str]:
    """What a host of which nothing is known could hold."""
    request = answer.request
    keeps_there = request.mst.get("offload_activations") is not False and request.mst.get("recompute") is not False
    if request.host_memory is not None or not keeps_there or answer.longest == request.work.shape.fixed_positions:
        return []
    return ["nothing is known of the host: with --host_memory_gib activations may lie there, which is longer or faster"]


def plan_table(plan: Plan) -> Table:
    """A table for rich: what was decided, and for each phase its memory and largest terms, in GiB.

    Every term with its formula stands in `plan.phases`.
    """
    title = _decisions(plan)
    # Otherwise the title would be wrapped to the columns.
    table = Table(
        title=title,
        caption=f"{_verdict(plan)}\n{_costs(plan)}",
        title_justify="left",
        caption_justify="left",
        min_width=len(title),
    )
    table.add_column("phase", no_wrap=True)
    table.add_column("device", no_wrap=True, justify="right")
    table.add_column("host", no_wrap=True, justify="right")
    table.add_column("largest on the device")
    for phase in plan.phases:
        terms = sorted((term for term in phase.terms if term.place == "device"), key=lambda term: -term.bytes)
        largest = ", ".join(f"{term.name} {_gib(term.bytes)}" for term in terms[:_SHOWN_TERMS])
        style = "bold" if phase is plan.peak_phase else None
        table.add_row(phase.name, _gib(phase.device_bytes), _gib(phase.host_bytes), largest, style=style)
    return table


def _decisions(plan: Plan) -> str:
    topology = plan.topology
    return (
        f"rank {topology.rank} of {topology.world_size}, dp {plan.dp_size}: {plan.shard_length} of {plan.seq_len} "
        f"tokens, ZeRO-{plan.zero_stage}, {plan.dtype}, {plan.settings}"
    )


def _costs(plan: Plan) -> str:
    """What each setting costs and saves, in GiB and TFLOPs; what it changes nothing of is left out."""
    settings = []
    for choice in plan.choices:
        changes = [
            f"{count / unit:+.3f} {name}"
            for count, unit, name in (
                (choice.device_bytes, GIB, "GiB on the device"),
                (choice.host_bytes, GIB, "GiB on the host"),
                (choice.copied_bytes, GIB, "GiB copied"),
                (choice.flops, 10**12, "TFLOPs"),
            )
            if count
        ]
        if choice.seconds:
            changes.append(f"{seconds_text(choice.seconds, sign='+')} s a step")
        if changes:
            settings.append(f"{choice.setting} {str(choice.value).lower()}: {', '.join(changes)}")
    return "; ".join([f"{plan.flops / 10**12:.3f} TFLOPs a micro-batch{_predicted(plan)}", *settings])


def _predicted(plan: Plan) -> str:
    if plan.predicted_step_seconds is None or plan.predicted_mfu is None:
        return ""
    return f", predicted {seconds_text(plan.predicted_step_seconds)} s a step, MFU {plan.predicted_mfu:.0%}"


def _verdict(plan: Plan) -> str:
    fits_device = plan.peak_bytes <= plan.device_memory
    verdict = "fits in" if fits_device else "does NOT fit in"
    # What fits the device, and all the same does not fit, lacks memory of the host.
    host_verdict = ", which does NOT fit" if fits_device and not plan.fits else ""
    caveat = "" if plan.counts_are_exact else "; parameters counted as those of a similar model, an estimate"
    if plan.layers_as_attention:
        kinds = ", ".join(plan.layers_as_attention)
        caveat = f"; layers of type {kinds} planned as if they were attention, an estimate"
    return (
        f"{_gib(plan.peak_bytes)} GiB at the peak ({plan.peak_phase.name}) {verdict} "
        f"{_gib(plan.device_memory)} GiB; host {_gib(plan.host_bytes)}{_of_host_memory(plan)} GiB{host_verdict}{caveat}"
    )


def _of_host_memory(plan: Plan) -> str:
    return "" if plan.host_memory is None else f" of {_gib(plan.host_memory)}"


def _gib(count: int) -> str:
    return f"{count / GIB:.3f}"

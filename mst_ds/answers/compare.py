"""Plans of one length side by side: ranks to a sequence, ZeRO stages, states on the device or on the host."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mst_ds.answers import variants
from mst_ds.answers.lengths import narrow_table
from mst_ds.answers.verdict import seconds_text
from mst_ds.config import GIB
from mst_ds.planner.phases import states_phase
from mst_ds.planner.plan import plan_of_request
from mst_ds.planner.request import Request
from mst_ds.planner.types import Plan
from mst_ds.zero import OffloadDevice

# By what is offloaded: where the optimizer's states and the parameters lie.
_OFFLOADS: dict[str, tuple[OffloadDevice, OffloadDevice]] = {
    "none": ("none", "none"),
    "optimizer": ("cpu", "none"),
    "both": ("cpu", "cpu"),
}


@dataclass(frozen=True)
class Row:
    """A plan, and which of the states it has on the host: "none", "optimizer" or "both"."""

    offload: str
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        plan = self.plan
        return {
            "sp_size": plan.sp_size,
            "stage": plan.zero_stage,
            "offload": self.offload,
            "layer_chunks": plan.settings.layer_chunks,
            "offload_activations": plan.settings.offload_activations,
            "fits": plan.fits,
            "peak_bytes": plan.peak_bytes,
            "host_bytes": plan.host_bytes,
            "predicted_step_seconds": plan.predicted_step_seconds,
            "tokens_per_second": plan.tokens_per_second,
        }


def compare(request: Request, sp_sizes: Iterable[int] | None = None) -> list[Row]:
    """What fits first, then by tokens/s, then by the device's memory. Left out are plans of which the states alone do
    not fit.

    Args:
        sp_sizes: those to try; None: all that the model and the ranks have.
    """
    rows = []
    for sp_size in sp_sizes or variants.sp_sizes(request, request.topology.world_size):
        for stage in range(variants.lowest_stage(request), 4):
            for offload, (optimizer, parameters) in _OFFLOADS.items():
                # Parameters that every rank has whole do not leave the device, nor does anything without ZeRO.
                if (offload == "both" and stage < 3) or (offload != "none" and stage == 0):
                    continue
                if offload != "none" and not request.work.zero.optimizer_may_leave:
                    continue
                states = variants.with_states(request, stage=stage, optimizer=optimizer, parameters=parameters)
                if states_phase(states.work).device_bytes > states.least_device_memory:
                    continue
                rows.append(Row(offload, plan_of_request(states.with_sp_size(sp_size), has_choices=False)))
    return sorted(rows, key=_rank)


def _rank(row: Row) -> tuple[bool, float, int]:
    plan = row.plan
    return not plan.fits, -(plan.tokens_per_second or 0), plan.peak_bytes


def comparison_table(rows: list[Row], *, ranks_per_node: int) -> Table:
    """A table for rich. Memory in GiB: of a device, and of a node's host."""
    plan = rows[0].plan
    columns = ("sp", "ZeRO", "offload", "layer chunks", "s/step", "tokens/s", "device", "host", "fits")
    table = narrow_table(columns)
    ranks = min(ranks_per_node, plan.topology.world_size)
    for row in rows:
        plan = row.plan
        seconds, pace = plan.predicted_step_seconds, plan.tokens_per_second
        table.add_row(
            str(plan.sp_size),
            str(plan.zero_stage),
            row.offload,
            str(plan.settings.layer_chunks),
            "-" if seconds is None else seconds_text(seconds),
            "-" if pace is None else f"{pace:,.0f}",
            f"{plan.peak_bytes / GIB:.1f}",
            f"{ranks * plan.host_bytes / GIB:.1f}",
            "yes" if plan.fits else "no",
        )
    return table

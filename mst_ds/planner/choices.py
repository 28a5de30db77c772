"""What each setting of a plan costs and saves, in memory and in time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mst_ds.planner.cost import step_seconds
from mst_ds.planner.flops import flops_computed_again
from mst_ds.planner.gpus import Gpu
from mst_ds.planner.kept import copied_bytes
from mst_ds.planner.phases import step_phases
from mst_ds.planner.types import Choice
from mst_ds.planner.workload import Workload


def describe_choices(work: Workload, *, mlp_chunks: int, loss_chunks: int, gpu: Gpu | None) -> tuple[Choice, ...]:
    """Each setting against its opposite, or against one group of heads, with everything else as it is.

    The opposite of no recompute keeps attention on the device.
    """
    other_recompute = {"keep_attention": not work.recompute, "offload_activations": False}
    opposites: dict[str, dict[str, Any]] = {"recompute": {"recompute": not work.recompute} | other_recompute}
    if work.recompute:
        opposites["keep_attention"] = {"keep_attention": not work.keep_attention}
        opposites["offload_activations"] = {"offload_activations": not work.offload_activations}
    if work.can_keep_mlp:
        opposites["keep_mlp"] = {"keep_mlp": not work.keep_mlp}
    if work.sp_size > 1:
        opposites["head_groups"] = {"head_groups": 1}

    def peaks(settings: Workload) -> tuple[int, int]:
        phases = step_phases(settings, mlp_chunks=mlp_chunks, loss_chunks=loss_chunks)
        return max(phase.device_bytes for phase in phases), max(phase.host_bytes for phase in phases)

    device_bytes, host_bytes = peaks(work)
    choices = []
    for setting, changes in opposites.items():
        other = replace(work, **changes)
        other_device_bytes, other_host_bytes = peaks(other)
        choices.append(
            Choice(
                setting=setting,
                value=getattr(work, setting),
                device_bytes=device_bytes - other_device_bytes,
                host_bytes=host_bytes - other_host_bytes,
                flops=flops_computed_again(work) - flops_computed_again(other),
                copied_bytes=copied_bytes(work) - copied_bytes(other),
                seconds=None if gpu is None else step_seconds(work, gpu) - step_seconds(other, gpu),
            )
        )
    return tuple(choices)

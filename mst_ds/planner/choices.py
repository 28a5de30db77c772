"""What each setting of a plan costs and saves, in memory and in time."""

from __future__ import annotations

from typing import Any

from mst_ds.gpus import Gpu
from mst_ds.planner.cost import step_seconds
from mst_ds.planner.flops import flops_computed_again
from mst_ds.planner.kept import copied_bytes
from mst_ds.planner.phases import step_phases
from mst_ds.planner.types import Choice
from mst_ds.planner.workload import Workload
from mst_ds.settings import KNOBS


def describe_choices(work: Workload, *, gpu: Gpu | None) -> tuple[Choice, ...]:
    """Each setting against its opposite, or against one group of heads or one chunk of a layer, with everything else as
    it is."""

    def peaks(work: Workload) -> tuple[int, int]:
        phases = step_phases(work)
        return max(phase.device_bytes for phase in phases), max(phase.host_bytes for phase in phases)

    device_bytes, host_bytes = peaks(work)
    choices = []
    for setting, changes in _opposites(work).items():
        other = work.with_settings(**changes)
        other_device_bytes, other_host_bytes = peaks(other)
        choices.append(
            Choice(
                setting=setting,
                value=getattr(work.settings, setting),
                device_bytes=device_bytes - other_device_bytes,
                host_bytes=host_bytes - other_host_bytes,
                flops=flops_computed_again(work) - flops_computed_again(other),
                copied_bytes=copied_bytes(work) - copied_bytes(other),
                seconds=None if gpu is None else step_seconds(work, gpu) - step_seconds(other, gpu),
            )
        )
    return tuple(choices)


def _opposites(work: Workload) -> dict[str, dict[str, Any]]:
    """For each setting that could be another, what changes. The opposite of no recompute keeps what is preferred, that
    of several groups or chunks is one."""
    settings = work.settings
    opposites: dict[str, dict[str, Any]] = {}
    for name, knob in KNOBS.items():
        has_effect = name not in work.without_effect and (settings.recompute or not knob.needs_recompute)
        if knob.choices and has_effect:
            opposites[name] = {name: not getattr(settings, name)}
        elif knob.needs_recompute and getattr(settings, name) != knob.off:
            opposites[name] = {name: knob.off}
    for name, knob in KNOBS.items():
        if knob.needs_recompute:
            preferred = work.without_effect.get(name, knob.choices[0] if knob.choices else knob.off)
            opposites["recompute"][name] = knob.off if settings.recompute else preferred
    if work.sp_size > 1:
        opposites |= {name: {name: 1} for name, knob in KNOBS.items() if knob.needs_sharding}
    return opposites

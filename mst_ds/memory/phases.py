"""Planned against measured: the most memory that each phase of a step took, beside what the plan has for it."""

from __future__ import annotations

import gc
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mst_ds.config import GIB
from mst_ds.memory.live import LiveMemory
from mst_ds.patching import decoder_of
from mst_ds.planner import Phase, Plan

# An excess above the plan divided by this is worth a warning.
_TOLERATED_PART = 10


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes of one phase, on the rank where they exceed the plan most."""

    phase: str
    planned: int
    measured: int

    @property
    def difference(self) -> float:
        """0.1: a tenth more than planned."""
        if self.planned == 0:
            return math.inf if self.measured else 0.0
        return self.measured / self.planned - 1

    @property
    def warning(self) -> str | None:
        """One line where the plan was far too low."""
        excess = self.measured - self.planned
        if excess * _TOLERATED_PART <= self.planned:
            return None
        return (
            f"warning: the {self.phase} took {self.measured / GIB:.3f} GiB, {self.difference:.0%} more than planned; "
            f"raise reserve_gib in the 'mst' block by {excess / GIB:.3f}"
        )


class PhaseMeter:
    """Measures one step of a patched model, as a context manager around it: `end` says which phase is over.

    On an accelerator it reads the peak of torch's allocator and resets it at each boundary. On the CPU, which has no
    such allocator, a phase's peak is what stood before the step, every tensor that Python's garbage collector knows,
    and what `LiveMemory` sees made in the step; that slows the step, and no other.

    Attributes:
        peaks: the most bytes by phase; of several micro-batches the largest. "initialisation" on an accelerator is the
            peak before the step, on the CPU what stands then.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._decoder = decoder_of(model)
        self._meter: _Meter = _CpuMeter() if device.type == "cpu" else _AcceleratorMeter(device)
        self._stack = ExitStack()
        self.peaks: dict[str, int] = {}

    def __enter__(self) -> PhaseMeter:
        self.peaks["initialisation"] = self._meter.start(self._stack)
        # The hidden states are there: what is left of the model's forward is the loss.
        self._stack.callback(self._decoder.register_forward_hook(lambda *_: self.end("forward")).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def end(self, phase: str) -> None:
        """What was taken since the last boundary belongs to `phase`."""
        self.peaks[phase] = max(self.peaks.get(phase, 0), self._meter.take_peak())


class _Meter(Protocol):
    def start(self, stack: ExitStack) -> int:
        """Begin, until `stack` is closed; return the bytes of the initialisation."""
        ...

    def take_peak(self) -> int:
        """The peak since the last call."""
        ...


class _AcceleratorMeter:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, stack: ExitStack) -> int:
        return self.take_peak()

    def take_peak(self) -> int:
        peak = int(torch.accelerator.max_memory_allocated(self._device))
        torch.accelerator.reset_peak_memory_stats(self._device)
        return peak


class _CpuMeter:
    def __init__(self) -> None:
        self._standing = 0
        self._made = LiveMemory()

    def start(self, stack: ExitStack) -> int:
        self._standing = _standing_bytes()
        stack.enter_context(self._made)
        return self._standing

    def take_peak(self) -> int:
        peak = self._standing + self._made.peak
        self._made.reset_peak()
        return peak


def _standing_bytes() -> int:
    """Of all tensors of this process on the CPU; those that share a storage count once."""
    # Not isinstance: that asks an object's __class__, which for a proxy may do anything.
    tensors = (each for each in gc.get_objects() if issubclass(type(each), Tensor))
    # Not the tensor's device: a fake tensor says cpu, and only its storage says that there is none.
    storages = (each.untyped_storage() for each in tensors if each.layout == torch.strided)
    return sum({each._cdata: each.nbytes() for each in storages if each.device.type == "cpu"}.values())


def planned_bytes(phase: Phase, device: torch.device) -> int:
    """What of a phase can be measured: all but the reserve, which tensors do not take. On the CPU the host is the
    device, and counts too, where nothing is pinned."""
    on_host = phase.host_bytes - phase.kind_bytes("reserve", "host") if device.type == "cpu" else 0
    return phase.device_bytes - phase.kind_bytes("reserve") + on_host


def compare(plan: Plan, peaks: Mapping[str, int], device: torch.device) -> list[PhaseMemory]:
    """Each phase that was measured, on the rank where it exceeds its own plan most. A collective call; every rank
    gets the same."""
    mine = [
        PhaseMemory(phase.name, planned_bytes(phase, device), peaks[phase.name])
        for phase in plan.phases
        if phase.name in peaks
    ]
    of_ranks: list[list[PhaseMemory]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    return [max(same_phase, key=lambda memory: memory.difference) for same_phase in zip(*of_ranks, strict=True)]

"""Where the time of a step goes: seconds of kernels by kind of work, and of the optimizer."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# By what stands in the name of a kernel, or of an operator of the CPU, the first that matches: cuDNN's attention is
# generated, cutlass serves both, and collectives copy as well.
_KINDS: Mapping[str, re.Pattern[str]] = {
    "collectives": re.compile(r"nccl|gloo|c10d", re.IGNORECASE),
    "attention": re.compile(r"flash|fmha|attention|attn|sdpa", re.IGNORECASE),
    "matrices": re.compile(
        r"gem[mv]|cutlass|nvjet|cublas|xmma|splitk|matmul|aten::\w*m[mv]_?$|aten::linear", re.IGNORECASE
    ),
    "host copies": re.compile(r"memcpy (htod|dtoh)", re.IGNORECASE),
}
# Elementwise operators, norms, sums, copies on the device.
_PASSES = "passes"
KINDS = (*_KINDS, _PASSES)
# By the clock.
MICRO_BATCH, OPTIMIZER = "micro-batch", "optimizer"
# The trace that chrome://tracing and Perfetto show.
TRACE_FILE = "trace.json.gz"


def step_to_profile(*, steps_done: int, max_steps: int) -> int:
    """The third of a process, or the last of two: the first one's kernels are compiled, and are measured."""
    return max(steps_done + 2, min(steps_done + 3, max_steps))


class StepProfile:
    """Profiles the forward and backward of a step's first micro-batch, and times the optimizer, as a context manager
    around the step: `end` says which phase is over.

    torch's profiler slows that step down, and keeps some hundred bytes for each kernel.

    Args:
        folder: gets the trace.
        step: the number of the step, see `step_to_profile`.

    Attributes:
        seconds: of kernels by kind, in the micro-batch, and by the clock of the micro-batch and of the optimizer's
            step; empty before that.
    """

    def __init__(self, device: torch.device, folder: Path, *, step: int) -> None:
        self.step = step
        self._device = device
        self._folder = folder
        self._stack = ExitStack()
        self._profiler: profile | None = None
        self._start = self._since = 0.0
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> StepProfile:
        activities = [ProfilerActivity.CPU]
        if self._device.type != "cpu":
            activities.append(ProfilerActivity.CUDA)
        self._profiler = self._stack.enter_context(profile(activities=activities))
        self._since = self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def end(self, phase: str) -> None:
        """What was computed since the last boundary belongs to `phase`."""
        self._synchronize()
        if phase == "backward" and self._profiler is not None:
            self.seconds[MICRO_BATCH] = time.perf_counter() - self._start
            self._stack.close()
            self.seconds |= by_kind(seconds_of_kernels(self._profiler, self._device))
            self._folder.mkdir(parents=True, exist_ok=True)
            self._profiler.export_chrome_trace(str(self._folder / TRACE_FILE))
            self._profiler = None
        elif phase == "optimizer_step":
            self.seconds[OPTIMIZER] = time.perf_counter() - self._since
        self._since = time.perf_counter()

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def seconds_of_kernels(profiler: profile, device: torch.device) -> Counter[str]:
    """By name: of the device's kernels. On a CPU of its operators, without those that they call and without the nodes
    of autograd, whose own time is that of Python's hooks and functions."""
    seconds: Counter[str] = Counter()
    for event in profiler.key_averages():
        if device.type != "cpu" and event.device_type != DeviceType.CPU:
            seconds[event.key] += event.self_device_time_total / 1e6
        elif device.type == "cpu" and "::" in event.key and "autograd::" not in event.key:
            seconds[event.key] += event.self_cpu_time_total / 1e6
    return seconds


def kind_of(name: str) -> str:
    """Of a kernel, by its name."""
    return next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), _PASSES)


def by_kind(seconds: Mapping[str, float]) -> dict[str, float]:
    """The sum of each kind, 0 where there is no such kernel."""
    sums = dict.fromkeys(KINDS, 0.0)
    for name, value in seconds.items():
        sums[kind_of(name)] += value
    return sums

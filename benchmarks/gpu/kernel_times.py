"""Where the time of one step goes: kernels by kind of work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.sections import Context
from benchmarks.measure import Bench, synchronize
from mst_ds.training.step_profile import by_kind, kind_of, seconds_of_kernels

KEYS = ("contender", "seq_len", "wall_seconds", "kinds", "kernels")
_NAME = "mst_ds"
_SHOWN = 25
_LONGEST_NAME = 120


def run(context: Context, results: dict[str, Any]) -> None:
    """One step of the project after one that does not count, under torch's profiler."""
    scale, device = context.scale, context.device
    length = scale.speed_lengths[-1]
    bench = Bench(scale.model, length, device)
    contender = bench.contender(_NAME, scale.work(length))
    bench.run(contender, "step")
    results |= {"contender": _NAME, "seq_len": length}
    results["wall_seconds"] = bench.seconds(contender, "step")
    activity = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        bench.run(contender, "step")
        synchronize(device)
    seconds = seconds_of_kernels(profiler, device)
    results["kinds"] = by_kind(seconds)
    results["kernels"] = [
        {"name": name[:_LONGEST_NAME], "kind": kind_of(name), "seconds": value}
        for name, value in seconds.most_common(_SHOWN)
    ]


def lines(results: Mapping[str, Any]) -> list[str]:
    """The share of each kind in the time of all kernels, and that in the step's."""
    kinds = results.get("kinds")
    if kinds is None:
        return []
    whole = sum(kinds.values())
    shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in kinds.items())
    return [f"{shares}; kernels run {whole / results['wall_seconds']:.0%} of the step's time"]

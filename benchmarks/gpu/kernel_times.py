"""Where the time of one step goes: kernels by class."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.sections import Context
from benchmarks.measure import Bench, synchronize

KEYS = ("contender", "seq_len", "wall_seconds", "classes", "kernels")
_NAME = "mst_ds"
# By what stands in a kernel's name, the first that matches: cuDNN's attention is generated, cutlass serves both.
_CLASSES: Mapping[str, re.Pattern[str]] = {
    "attention": re.compile(r"flash|fmha|attention|attn|sdpa", re.IGNORECASE),
    "products": re.compile(
        r"gemm|cutlass|nvjet|cublas|xmma|splitk|matmul|aten::(add|b)?mm|aten::linear", re.IGNORECASE
    ),
    "copies": re.compile(r"memcpy|memset|copy|catarray", re.IGNORECASE),
}
_OTHERS = "elementwise and sums"
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
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        micros = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        seconds[event.key] += micros / 1e6
        calls[event.key] += event.count
    results["classes"] = by_class(seconds)
    results["kernels"] = [
        {"name": name[:_LONGEST_NAME], "class": class_of(name), "seconds": value, "calls": calls[name]}
        for name, value in seconds.most_common(_SHOWN)
    ]


def class_of(name: str) -> str:
    """Of a kernel, by its name."""
    return next((kind for kind, pattern in _CLASSES.items() if pattern.search(name)), _OTHERS)


def by_class(seconds: Mapping[str, float]) -> dict[str, float]:
    """The sum of each class, 0 where there is no such kernel."""
    sums = dict.fromkeys((*_CLASSES, _OTHERS), 0.0)
    for name, value in seconds.items():
        sums[class_of(name)] += value
    return sums


def lines(results: Mapping[str, Any]) -> list[str]:
    """The share of each class in the time of all kernels, and that in the step's."""
    classes = results.get("classes")
    if classes is None:
        return []
    whole = sum(classes.values())
    shares = ", ".join(f"{name} {value / whole:.0%}" for name, value in classes.items())
    return [f"{shares}; kernels run {whole / results['wall_seconds']:.0%} of the step's time"]

"""What it costs to keep activations on the host, and what it saves of the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.sections import Context, gib, median
from benchmarks.gpu.speed import add_timed
from benchmarks.measure import Bench

KEYS = ("records", "pinned_bytes")
_NAMES = ("mst_ds", "mst_ds, offload", "mst_ds, MLP kept", "mst_ds, MLP kept, offload")


def run(context: Context, results: dict[str, Any]) -> None:
    """Time and memory with and without, and what of the host torch's allocator has pinned for it."""
    scale = context.scale
    length = scale.speed_lengths[-1]
    bench = Bench(scale.model, length, context.device)
    records: list[dict[str, Any]] = []
    results["records"] = records
    add_timed(records, bench, _NAMES, scale.work(length), scale.rounds)
    results["pinned_bytes"] = _pinned_bytes() if context.device.type == "cuda" else None


def _pinned_bytes() -> dict[str, int]:
    """All counters of bytes, whose names differ from release to release."""
    return {name: value for name, value in torch.cuda.host_memory_stats().items() if "bytes" in name}


def lines(results: Mapping[str, Any]) -> list[str]:
    """A line for each contender."""
    shown = []
    for record in results.get("records", ()):
        if "seconds" not in record:
            shown.append(f"{record['contender']}: {record.get('error', 'not timed')}")
            continue
        line = f"{record['contender']}: {median(record['seconds']):.3f} s, {gib(record['peak_bytes'])}"
        reserved = record["reserved_bytes"]
        shown.append(line if reserved is None else f"{line}, {gib(reserved)} reserved")
    return shown

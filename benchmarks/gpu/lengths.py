"""The longest sequences within a limit that the process sets itself, found by running out of memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.contenders import missing_package
from benchmarks.gpu.sections import Context, attempt, gib
from benchmarks.measure import Bench, free_memory, longest
from mst_ds.config import GIB

KEYS = ("limit_bytes", "standing_bytes", "records")
EXTRAPOLATED_TO = 80 * GIB
_NAMES = ("recompute", "Liger + recompute", "mst_ds", "DeepSpeed ALST")
_FIRST_STEPS = 8  # of `length_step`, where the search begins


def run(context: Context, results: dict[str, Any]) -> None:
    """Each contender's longest length, the peaks of all that fitted, and what a line through these says of 80 GiB."""
    scale, records = context.scale, list[dict[str, Any]]()
    results["limit_bytes"], results["records"] = scale.limit, records
    bench = Bench(scale.wide, scale.length_step, context.device)
    free_memory(context.device)
    standing = torch.cuda.memory_allocated(context.device) if context.device.type == "cuda" else 0
    results["standing_bytes"] = standing
    with _limited(context.device, scale.limit):
        for name in _NAMES:
            package = missing_package(name)
            if package is not None:
                records.append({"contender": name, "error": f"{package} is not installed"})
                continue
            peaks: list[tuple[int, int]] = []
            records.append({"contender": name, "peaks": peaks})
            records[-1] |= attempt(functools.partial(_search, context, bench, name, standing, peaks))


def _search(context: Context, bench: Bench, name: str, standing: int, peaks: list[tuple[int, int]]) -> dict[str, Any]:
    scale = context.scale

    def fits(seq_len: int) -> bool:
        usage = bench.at(seq_len).fits(name, scale.work(seq_len), "step", scale.limit)
        if usage is not None:
            peaks.append((seq_len, standing + usage.peak_bytes))
        return usage is not None

    found = longest(fits, shortest=_FIRST_STEPS * scale.length_step, step=scale.length_step)
    return {"longest": found, **extrapolate(sorted(peaks))}


def extrapolate(peaks: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The line through (tokens, peak bytes) of least squares, and the tokens at which it reaches 80 GiB: extrapolated,
    not measured. Empty where there are fewer than two points.

    Lengths below a quarter of the longest are left out: there another moment of the step may be its peak.
    """
    peaks = [(length, peak) for length, peak in peaks if 4 * length >= max(length for length, _ in peaks)]
    if len(peaks) < 2:
        return {}
    tokens, mean = (sum(pair[index] for pair in peaks) / len(peaks) for index in range(2))
    spread = sum((length - tokens) ** 2 for length, _ in peaks)
    slope = sum((length - tokens) * (peak - mean) for length, peak in peaks) / spread
    fixed = mean - slope * tokens
    reached = int((EXTRAPOLATED_TO - fixed) / slope) if slope > 0 else None
    return {"bytes_per_token": slope, "fixed_bytes": fixed, "extrapolated_longest_80_gib": reached}


@contextmanager
def _limited(device: torch.device, limit: int) -> Iterator[None]:
    """torch's allocator takes no more than `limit` bytes of the device.

    Raises:
        RuntimeError: it takes more all the same.
    """
    if device.type != "cuda":
        yield
        return
    whole = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / whole), device)
    try:
        if _takes(limit, device):
            raise RuntimeError("torch's allocator does not keep to the limit: lengths would be those of the device")
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _takes(count: int, device: torch.device) -> bool:
    try:
        torch.empty(count, dtype=torch.uint8, device=device)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        free_memory(device)


def lines(results: Mapping[str, Any]) -> list[str]:
    """A line for each contender."""
    shown = []
    for record in results.get("records", ()):
        if "longest" not in record:
            at_least = max((tokens for tokens, _ in record.get("peaks", ())), default=0)
            shown.append(f"{record['contender']}: {record.get('error', f'at least {at_least} tokens, not finished')}")
            continue
        reached = record.get("extrapolated_longest_80_gib")
        end = f"; extrapolated to 80 GiB: {reached}" if reached is not None else ""
        shown.append(f"{record['contender']}: {record['longest']} tokens in {gib(results['limit_bytes'])}{end}")
    return shown

"""A step on packed documents, each of a length that no kernel has seen."""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender
from benchmarks.gpu.sections import Context, attempt
from benchmarks.gpu.timing import host_and_device_seconds
from benchmarks.measure import Bench

KEYS = ("documents", "records")
_NAMES = ("mst_ds", "recompute")
_BATCHES = ("one document", "one document", "first batch", "first batch", "second batch", "second batch")


def run(context: Context, results: dict[str, Any]) -> None:
    """Each batch twice: with lengths that are new, and with the same ones again."""
    scale, records = context.scale, list[dict[str, Any]]()
    bench = Bench(scale.model, scale.packed_length, context.device)
    lengths = {
        "one document": [scale.packed_length],
        "first batch": random_lengths(scale.packed_length, scale.packed_documents, seed=1),
        "second batch": random_lengths(scale.packed_length, scale.packed_documents, seed=2),
    }
    results["documents"], results["records"] = lengths, records
    for name in _NAMES:
        contender = bench.contender(name, scale.work(scale.packed_length))
        bench.unless_out_of_memory(functools.partial(bench.run, contender, "step"))
        for index, batch in enumerate(_BATCHES):
            positions = _positions(lengths[batch], context.device)
            record = attempt(functools.partial(_step, bench, contender, positions))
            records.append({"contender": name, "batch": batch, "time": index % 2 + 1, **record})


def random_lengths(total: int, count: int, seed: int) -> list[int]:
    """So many different places cut a row of `total` tokens."""
    cuts = sorted(random.Random(seed).sample(range(1, total), count - 1))
    return [stop - start for start, stop in zip([0, *cuts], [*cuts, total], strict=True)]


def _positions(lengths: list[int], device: torch.device) -> Tensor:
    return torch.cat([torch.arange(length, device=device) for length in lengths])[None]


def _step(bench: Bench, contender: Contender, positions: Tensor) -> dict[str, Any]:
    bench.model.zero_grad()
    found: list[tuple[float, float]] = []

    def step() -> bool:
        found.append(
            host_and_device_seconds(
                lambda: contender.loss(bench.input_ids, position_ids=positions).backward(), bench.device
            )
        )
        return True

    if bench.unless_out_of_memory(step) is None:
        return {"error": "out of memory"}
    host, whole = found[0]
    return {"host_seconds": host, "seconds": whole}


def lines(results: Mapping[str, Any]) -> list[str]:
    """Of each contender and batch the two times."""
    shown: dict[str, list[str]] = {}
    for record in results.get("records", ()):
        value = f"{record['seconds']:.3f} s" if "seconds" in record else record["error"]
        shown.setdefault(f"{record['contender']}, {record['batch']}", []).append(value)
    return [f"{label}: {', then '.join(values)}" for label, values in shown.items()]

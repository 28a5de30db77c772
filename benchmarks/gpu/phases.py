"""Memory by phase: planned, allocated, reserved, and what is not torch's."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.contenders import Contender
from benchmarks.gpu.sections import Context, gib
from benchmarks.measure import Bench, free_memory, outside_bytes
from mst_ds.memory.phases import PhaseMeter, planned_bytes
from mst_ds.planner import Phase

KEYS = ("records",)
_NAMES = ("mst_ds", "mst_ds, planned", "mst_ds, offload")
# No optimizer takes part: a contender is a model alone.
_OF_OPTIMIZER = ("master_parameters", "optimizer_moments")


def run(context: Context, results: dict[str, Any]) -> None:
    """The whole model at the shorter length, the wide layers at the longer one."""
    records: list[dict[str, Any]] = []
    results["records"] = records
    scale = context.scale
    for size, length in zip((scale.model, scale.wide), scale.phase_lengths, strict=True):
        bench = Bench(size, length, context.device)
        for name in _NAMES:
            contender = bench.contender(name, scale.work(length))
            found = bench.unless_out_of_memory(functools.partial(_measure, bench, contender))
            label = {"hidden_size": size.dimensions["hidden_size"], "seq_len": length, "contender": name}
            records.append({**label, **(found or {"error": "out of memory"})})
        del bench
        free_memory(context.device)


def _measure(bench: Bench, contender: Contender) -> dict[str, Any]:
    """The phases of one step's forward, loss and backward, by name."""
    plan, device = contender.plan, bench.device
    assert plan is not None
    bench.model.zero_grad()
    free_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the meter begins with the peak of what was before
    reserved: dict[str, int | None] = {}
    with PhaseMeter(contender.model, device) as meter:
        loss = contender.loss(bench.input_ids)
        meter.end("loss")
        reserved["loss"] = _reserved(device)
        loss.backward()
        meter.end("backward")
        reserved["backward"] = _reserved(device)
    outside = outside_bytes(device) if device.type == "cuda" else None
    bench.model.zero_grad()
    phases = {phase.name: phase for phase in plan.phases}
    found = {
        name: {
            "planned_bytes": _planned(phases[name], device),
            "allocated_bytes": meter.peaks[name],
            "reserved_bytes": reserved.get(name),
        }
        for name in meter.peaks
    }
    return {"settings": str(plan.settings), "outside_bytes": outside, "phases": found}


def _planned(phase: Phase, device: torch.device) -> int:
    optimizer = sum(term.bytes for term in phase.terms if term.name in _OF_OPTIMIZER and term.place == "device")
    return planned_bytes(phase, device) - optimizer


def _reserved(device: torch.device) -> int | None:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else None


def lines(results: Mapping[str, Any]) -> list[str]:
    """Of each contender the phase that takes most."""
    shown = []
    for record in results.get("records", ()):
        label = f"{record['contender']}, {record['seq_len']} tokens"
        if "phases" not in record:
            shown.append(f"{label}: {record['error']}")
            continue
        name, peak = max(record["phases"].items(), key=lambda item: item[1]["allocated_bytes"])
        planned, allocated = (gib(peak[f"{kind}_bytes"]) for kind in ("planned", "allocated"))
        line = f"{label}, {name}: {planned} planned, {allocated} allocated"
        if peak["reserved_bytes"] is not None:
            line += f", {gib(peak['reserved_bytes'])} reserved"
        shown.append(line)
    return shown

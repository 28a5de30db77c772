"""Times of a step, beside what users would choose instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.contenders import Contender, Work, missing_package
from benchmarks.flops import Counts
from benchmarks.gpu.sections import Context, attempt, gib, median
from benchmarks.measure import Bench, Usage, free_memory, interleaved_seconds

KEYS = ("records",)
_REFERENCE = "recompute"
_NAMES = (_REFERENCE, "Liger + recompute", "DeepSpeed ALST", "mst_ds", "mst_ds, planned")


def run(context: Context, results: dict[str, Any]) -> None:
    """Each length: one run that does not count, whose memory is read, then interleaved rounds."""
    records: list[dict[str, Any]] = []
    results["records"] = records
    scale = context.scale
    bench = Bench(scale.model, scale.speed_lengths[0], context.device)
    for length in scale.speed_lengths:
        add_timed(records, bench.at(length), _NAMES, scale.work(length), scale.rounds)


def add_timed(records: list[dict[str, Any]], bench: Bench, names: Sequence[str], work: Work, rounds: int) -> None:
    """Adds a record a contender: seconds, tokens/s, time as a multiple of ordinary recompute's, memory and kernels; or
    why there is none."""
    contenders: list[Contender] = []
    for name in names:
        records.append({"contender": name, "seq_len": work.seq_len, **_warm_up(bench, name, work, contenders)})
    added = {record["contender"]: record for record in records[len(records) - len(names) :]}
    try:
        for name, value in interleaved_seconds(bench, contenders, "step", rounds):
            added[name].setdefault("seconds", []).append(value)
    finally:
        timed = {name: median(record["seconds"]) for name, record in added.items() if "seconds" in record}
        for name, seconds in timed.items():
            ratio = seconds / timed[_REFERENCE] if _REFERENCE in timed else None
            added[name] |= {"tokens_per_second": work.seq_len / seconds, "time_to_recompute": ratio}


def _warm_up(bench: Bench, name: str, work: Work, contenders: list[Contender]) -> dict[str, Any]:
    """Memory and kernels of the first run; a contender that can run is added to `contenders`."""
    package = missing_package(name)
    if package is not None:
        return {"error": f"{package} is not installed"}

    def measure() -> dict[str, Any]:
        contender = bench.contender(name, work)
        found: tuple[Usage, Counts] | None = bench.unless_out_of_memory(lambda: bench.examine(contender, "step"))
        if found is None:
            return {"error": "out of memory"}
        contenders.append(contender)
        usage = asdict(found[0])
        return {"first_seconds": usage.pop("seconds"), **usage, "attention_kernels": found[1].attention_kernels}

    record = attempt(measure)
    if "error" in record:
        free_memory(bench.device)
    return record


def run_long(context: Context, results: dict[str, Any]) -> None:
    """One step each of the wide layers at the longest length. What is the project's own comes first, so that it is
    there if time does not suffice for all."""
    records: list[dict[str, Any]] = []
    results["records"] = records
    length = context.scale.long_length
    bench = Bench(context.scale.wide, length, context.device)
    for name in reversed(_NAMES):
        records.append(_one_step(bench, name, context.scale.work(length)))


def _one_step(bench: Bench, name: str, work: Work) -> dict[str, Any]:
    label = {"contender": name, "seq_len": work.seq_len}
    package = missing_package(name)
    if package is not None:
        return {**label, "error": f"{package} is not installed"}

    def measure() -> dict[str, Any]:
        contender = bench.contender(name, work)
        usage = bench.unless_out_of_memory(lambda: bench.usage(contender, "step"))
        if usage is None:
            return {"error": "out of memory"}
        return {**asdict(usage), "seconds": [usage.seconds], "tokens_per_second": work.seq_len / usage.seconds}

    record = {**label, **attempt(measure)}
    free_memory(bench.device)
    return record


def lines(results: Mapping[str, Any]) -> list[str]:
    """A line for each length and contender."""
    return [_line(record) for record in results.get("records", ())]


def _line(record: Mapping[str, Any]) -> str:
    label = f"{record['contender']}, {record['seq_len']} tokens"
    if "seconds" not in record:
        return f"{label}: {record.get('error', 'not timed')}"
    line = f"{label}: {median(record['seconds']):.3f} s, {record['tokens_per_second']:.0f} tokens/s"
    if record.get("time_to_recompute") is not None:
        line += f", {record['time_to_recompute']:.2f} of recompute's time"
    return f"{line}, {gib(record['peak_bytes'])} above the weights"

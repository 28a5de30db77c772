"""What was measured, as a table for people and as JSON for `benchmarks.write_report`."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.measure import Result
from mst_ds.config import GIB

RESULTS = Path(__file__).with_name("results")


def ratios(result: Result, reference: Result) -> list[float]:
    """Time against the reference's in the same round."""
    return [own / other for own, other in zip(result.seconds, reference.seconds, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return lower, median, upper


def as_table(title: str, results: Sequence[Result], seq_len: int, references: Sequence[str]) -> Table:
    """One row a contender; a column of ratios for each reference that was measured."""
    by_name = {result.contender: result for result in results}
    columns = [name for name in references if name in by_name]
    headings = [f"time / {name}" for name in columns]
    table = Table(
        "contender", "seconds", *headings, "tokens/s", "peak GiB", "matrix GFLOP", "attention GFLOP", "attention fw+bw",
        title=title,
    )  # fmt: skip
    for result in results:
        seconds = quartiles(result.seconds)
        table.add_row(
            result.contender,
            _spread(seconds),
            *(_spread(quartiles(ratios(result, by_name[name]))) for name in columns),
            f"{seq_len / seconds[1]:.0f}",
            f"{result.peak_bytes / GIB:.3f}",
            f"{result.counts.matrix / 1e9:.0f}",
            f"{result.counts.attention / 1e9:.0f}",
            f"{result.counts.attention_forwards}+{result.counts.attention_backwards}",
        )
    return table


def _spread(values: tuple[float, float, float]) -> str:
    lower, median, upper = values
    return f"{median:.3f} ({lower:.3f}-{upper:.3f})"


def as_record(results: Sequence[Result], **settings: Any) -> dict[str, Any]:
    """One length and part, with everything that was measured."""
    return {**settings, "results": [asdict(result) for result in results]}


def write_json(path: Path, device: torch.device, settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Writes what was measured, with where and with what."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"where": _where(device), "settings": dict(settings), **content}
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _where(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "commit": _git("rev-parse", "HEAD")
        + ("-dirty" if _git("status", "--porcelain", "mst_ds", "benchmarks") else ""),
        "device": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "deepspeed")},
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def _git(*command: str) -> str:
    outcome = subprocess.run(
        ["git", *command], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False
    )
    return outcome.stdout.strip()

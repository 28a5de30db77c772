"""What was measured, as a table for people and as JSON for `benchmarks.write_report`."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.measure import Measured, Result
from mst_ds.config import GIB
from mst_ds.files.whole_file import replace_file

_PACKAGES = ("torch", "transformers", "deepspeed", "triton", "flash-attn", "liger-kernel")
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


def as_record(measured: Measured, **settings: Any) -> dict[str, Any]:
    """One length and part, with everything that was measured."""
    return {**settings, **asdict(measured)}


def write_json(path: Path, device: torch.device, settings: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Writes what was measured, with where and with what: the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"where": where(device), "settings": dict(settings), **content}
    replace_file(path, json.dumps(_strict(document), indent=1, allow_nan=False) + "\n")


def _strict(value: Any) -> Any:
    """The same with None for numbers that JSON does not have: NaN and infinities."""
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@functools.cache
def where(device: torch.device) -> Mapping[str, Any]:
    """The device and the versions of what runs on it; None for what is not there."""
    return {
        "commit": _git("rev-parse", "HEAD")
        + ("-dirty" if _git("status", "--porcelain", "mst_ds", "benchmarks") else ""),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or None,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def _git(*command: str) -> str:
    return _output("git", *command)


def _output(*command: str) -> str:
    """What a command says; nothing where there is no such command."""
    folder = Path(__file__).parent.parent
    try:
        outcome = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return outcome.stdout.strip()

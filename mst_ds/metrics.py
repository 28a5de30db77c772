"""What a training run measures, and where it is written.

In the output folder: `metrics.jsonl` (one strict JSON object a line), `tensorboard/` (event files) and, at
the end, `summary.json`. On stdout: a progress bar, or a plain line now and then where it is no terminal.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Protocol

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table
from torch.utils.tensorboard import SummaryWriter

from mst_ds.config import GIB

# Dense bf16/fp16 FLOP/s of one device, from the vendors' data sheets (half of the figures that NVIDIA prints
# "with sparsity"). Matched in this order against the device's name.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH[12]00 NVL\b", 835.5e12),
    (r"\bH[18]00 PCIe\b", 756.5e12),
    (r"\b(H100|H200|H800|GH200)\b", 989.5e12),
    (r"\bH20\b", 148e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bL40S\b", 362.05e12),
    (r"\bL40\b", 181.05e12),
    (r"\bL4\b", 121e12),
    (r"\bMI3(00|25)X\b", 1307.4e12),
)
_VERSIONED_PACKAGES = ("mst_ds", "torch", "deepspeed", "transformers", "datasets")
_PLAIN_LINE_SECONDS = 10.0

Value = float | int | None


class PlannedMemory(Protocol):
    """Bytes of one phase of a step, planned and measured."""

    @property
    def phase(self) -> str: ...
    @property
    def planned(self) -> int: ...
    @property
    def measured(self) -> int: ...
    @property
    def difference(self) -> float:
        """Measured against planned: 0.1 is a tenth more."""

    @property
    def warning(self) -> str | None:
        """One line for people, where there is something to say."""


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes that this process has needed on `device`.

    On an accelerator: the most that tensors occupied at once, as torch's allocator counted it. On the CPU:
    the process' resident set now, as not every platform keeps a peak of it.
    """
    if device.type == "cpu":
        return psutil.Process().memory_info().rss
    return int(torch.accelerator.max_memory_allocated(device))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data sheet's FLOP/s of one `device` for dense matrix products in `dtype`, None where unknown.

    Known are the common data-centre GPUs in bf16 and fp16. A MIG slice is a part of a GPU of unknown size.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:
        return None
    return next((flops for pattern, flops in _PEAK_FLOPS if re.search(pattern, name)), None)


def device_name(device: torch.device) -> str:
    """What it is called: a GPU by its maker's name, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # mst_ds itself, where it runs from its source folder
            continue
    return versions


class MetricsWriter:
    """Writes the metrics of a run: rank 0 does, on every other rank each method does nothing.

    It is a context manager, so that the files are closed and the terminal is restored when training fails.
    `metrics.jsonl` is started anew, or goes on after `steps_done`: a run has an output folder of its own.

    Args:
        output_dir: folder for the files; made if it is missing.
        max_steps: number of the last step.
        steps_done: steps that this run took before it was resumed; what it logged of later ones is dropped.
        rank: this process' global rank.
        flops_per_token: see `mst_ds.model_shape.flops_per_token`; None leaves the MFU out.
        peak_flops: FLOP/s of all devices of the run together; None leaves the MFU out.
        console: where progress is shown; stdout by default.

    Raises:
        OSError: `output_dir` cannot be made or written.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        max_steps: int,
        steps_done: int = 0,
        rank: int = 0,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        console: Console | None = None,
    ) -> None:
        self._folder = Path(output_dir)
        self._mfu_per_rate = flops_per_token / peak_flops if flops_per_token and peak_flops else None
        self._totals = _Totals()
        self._memory: dict[str, dict[str, int]] = {}
        self._sinks: tuple[_Sink, ...] = ()
        if rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            lines = self._folder / "metrics.jsonl"
            earlier = _records_until(lines, steps_done)
            for record in earlier:
                self._totals.add_record(record)
            self._sinks = (
                _Display(console or Console(), max_steps),
                _JsonLines(lines, earlier),
                _TensorBoard(self._folder / "tensorboard", steps_done),
            )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        tokens_per_second: float,
        grad_norm: float | None,
        learning_rate: float,
        device_memory_bytes: int,
        seconds: float,
        tokens: int,
        is_skipped: bool = False,
    ) -> None:
        """Logs an optimizer step.

        Args:
            step: counted from 1.
            loss: mean over the step's valid tokens.
            tokens_per_second: of all ranks together.
            grad_norm: global norm before clipping; None where there is none.
            learning_rate: the one this step used.
            device_memory_bytes: see `peak_memory_bytes`.
            seconds: wall time of this step.
            tokens: processed in this step by all ranks together.
            is_skipped: the step changed no weight, because its loss or gradient norm was not finite.
        """
        self._totals.add(
            loss=loss, tokens=tokens, seconds=seconds, memory_bytes=device_memory_bytes, is_skipped=is_skipped
        )
        values: dict[str, Value] = {
            "loss": loss,
            "tokens_per_second": tokens_per_second,
            "grad_norm": grad_norm,
            "lr": learning_rate,
            "memory_bytes": device_memory_bytes,
            "seconds": seconds,
            "tokens": tokens,
            "skipped_steps": self._totals.skipped_steps,
        }
        if self._mfu_per_rate is not None:
            values["mfu"] = tokens_per_second * self._mfu_per_rate
        for sink in self._sinks:
            sink.log_step(step, values)

    def log_eval(self, step: int, loss: float) -> None:
        """Logs the loss on the held-out data after `step` optimizer steps."""
        for sink in self._sinks:
            sink.log_eval(step, loss)

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None:
        """Logs planned and measured memory of the phases of `step`, once in a run."""
        self._memory = _by_phase(phases)
        for sink in self._sinks:
            sink.log_memory(step, phases)

    def write_summary(self, fields: Mapping[str, Any]) -> None:
        """Writes `summary.json` at once or not at all: totals of the logged steps, memory, versions and `fields`.

        `fields` (such as the plan) may hold what JSON can; a name that the totals have too takes its place.
        """
        if self._sinks:
            summary = {**self._totals.summary(), **self._memory, "versions": package_versions(), **fields}
            text = json.dumps(_finite(summary), indent=2, allow_nan=False)
            partial = self._folder / "summary.json.partial"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self._folder / "summary.json")


@dataclass
class _Totals:
    """Sums over the steps of a run."""

    first_loss: float | None = None
    final_loss: float | None = None
    steps: int = 0
    skipped_steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0

    def add(self, *, loss: float | None, tokens: int, seconds: float, memory_bytes: int, is_skipped: bool) -> None:
        if self.first_loss is None:
            self.first_loss = loss
        self.final_loss = loss
        self.steps += 1
        self.skipped_steps += is_skipped
        self.tokens += tokens
        self.seconds += seconds
        self.peak_memory_bytes = max(self.peak_memory_bytes, memory_bytes)

    def add_record(self, record: Mapping[str, Any]) -> None:
        """A line of `metrics.jsonl`; only those of optimizer steps count."""
        if "loss" in record:
            self.add(
                loss=record["loss"],
                tokens=record["tokens"],
                seconds=record["seconds"],
                memory_bytes=record["memory_bytes"],
                is_skipped=record["skipped_steps"] > self.skipped_steps,
            )

    def summary(self) -> dict[str, Any]:
        rate = self.tokens / self.seconds if self.seconds else None
        return {**vars(self), "tokens_per_second": rate}


class _Sink(Protocol):
    """One place that metrics go to."""

    def log_step(self, step: int, values: Mapping[str, Value]) -> None: ...

    def log_eval(self, step: int, loss: float) -> None: ...

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None: ...

    def close(self) -> None: ...


class _JsonLines:
    """A JSON object a line. Line-buffered: a run that dies leaves every step that it finished."""

    def __init__(self, path: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        # At once or not at all: a kill in here loses nothing of what an earlier part of the run has logged.
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in earlier), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log_step(self, step: int, values: Mapping[str, Value]) -> None:
        self._write({"step": step, **values})

    def log_eval(self, step: int, loss: float) -> None:
        self._write({"step": step, "eval_loss": loss})

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None:
        self._write({"step": step, **_by_phase(phases)})

    def _write(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    """TensorBoard event files, with the tags train/…, eval/loss, planned_bytes/… and measured_bytes/…."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        # purge_step hides the events of later steps that are in this folder.
        self._writer = SummaryWriter(str(folder), purge_step=steps_done + 1 if steps_done else 0)

    def log_step(self, step: int, values: Mapping[str, Value]) -> None:
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(f"train/{name}", value, step)

    def log_eval(self, step: int, loss: float) -> None:
        self._writer.add_scalar("eval/loss", loss, step)

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None:
        for name, of_phases in _by_phase(phases).items():
            for phase, count in of_phases.items():
                self._writer.add_scalar(f"{name}/{phase}", count, step)

    def close(self) -> None:
        self._writer.close()


class _Display:
    """A progress bar on a terminal; elsewhere a plain line every ten seconds, and for the first and last."""

    def __init__(self, console: Console, max_steps: int) -> None:
        self._console = console
        self._max_steps = max_steps
        self._recent_seconds: deque[float] = deque(maxlen=20)
        self._seconds_since_line = math.inf
        self._against_plan = ""
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                MofNCompleteColumn(),
                BarColumn(bar_width=10),
                TextColumn("{task.description}", table_column=Column(overflow="fold"), markup=False),
                console=console,
                refresh_per_second=2,
            )
            self._task = self._bar.add_task("waiting for the first step", total=max_steps)
            self._bar.start()

    def log_step(self, step: int, values: Mapping[str, Value]) -> None:
        seconds = values["seconds"] or 0.0
        self._recent_seconds.append(seconds)
        self._seconds_since_line += seconds
        # The median: the first step, with its compilation and first allocations, would spoil a mean.
        left = timedelta(seconds=round(median(self._recent_seconds) * max(0, self._max_steps - step)))
        line = f"{_describe(values)}{self._against_plan}  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)
        elif self._seconds_since_line >= _PLAIN_LINE_SECONDS or step >= self._max_steps:
            self._print(f"step {step:>{len(str(self._max_steps))}}/{self._max_steps}  {line}")
            self._seconds_since_line = 0.0

    def log_eval(self, step: int, loss: float) -> None:
        self._print(f"step {step}: evaluation loss {loss:.4f}")

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None:
        table = Table("phase", title=f"memory of step {step}, worst rank, GiB")
        for name in ("planned", "measured", "difference"):
            table.add_column(name, justify="right")
        for each in phases:
            table.add_row(
                each.phase, f"{each.planned / GIB:.3f}", f"{each.measured / GIB:.3f}", f"{each.difference:+.1%}"
            )
        self._console.print(table)
        for warning in (each.warning for each in phases):
            if warning is not None:
                self._print(warning)
        if phases:
            highest = max(phases, key=lambda each: each.measured)
            self._against_plan = f" ({highest.phase} {highest.difference:+.0%} of plan)"

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _describe(values: Mapping[str, Value]) -> str:
    """The metrics of a step for people, in one line."""
    parts = (
        ("loss", "loss {:.4f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("mfu", "MFU {:.1%}"),
        ("lr", "lr {:.2e}"),
        ("grad_norm", "grad norm {:.2f}"),
    )
    texts = [text.format(values[name]) for name, text in parts if values.get(name) is not None]
    if values.get("skipped_steps"):
        texts.append(f"skipped {values['skipped_steps']}")
    return "  ".join([*texts, f"{(values['memory_bytes'] or 0) / GIB:.2f} GiB"])


def _by_phase(phases: Sequence[PlannedMemory]) -> dict[str, dict[str, int]]:
    return {
        "planned_bytes": {each.phase: each.planned for each in phases},
        "measured_bytes": {each.phase: each.measured for each in phases},
    }


def _records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` up to this step; a last line that was cut off by a kill is none."""
    if step == 0 or not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= step:
            records.append(record)
    return records


def _finite(value: Any) -> Any:
    """`value` with null for each NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

"""The metrics of a run for people: a progress bar on a terminal, elsewhere plain lines."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from mst_ds.config import GIB
from mst_ds.metrics.records import PlannedMemory, Value

_PLAIN_LINE_SECONDS = 10.0
_OF_OBJECTIVES = {"loss": "loss {:.4f}", "rewards/accuracies": "accuracy {:.3f}", "rewards/margins": "margin {:.3f}"}
_OF_STEPS = {
    "tokens_per_second": "{:,.0f} tokens/s",
    "mfu": "MFU {:.1%}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.2f}",
}


class Display:
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

    def log_eval(self, step: int, values: Mapping[str, Value]) -> None:
        self._print(f"step {step}: evaluation {_objective(values)}")

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None:
        table = Table("phase", title=f"memory of step {step}, worst rank, GiB")
        for name in ("planned", "measured", "difference"):
            table.add_column(name, justify="right")
        for each in phases:
            table.add_row(
                each.phase, f"{each.planned / GIB:.3f}", f"{each.measured / GIB:.3f}", f"{each.difference:+.1%}"
            )
        self._console.print(table)
        if any(each.phase == "initialisation" and each.difference < 0 for each in phases):
            self._print(
                "below the plan before the optimizer step: the optimizer's moments are made in it, and are there from "
                "the next step on"
            )
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


def _objective(values: Mapping[str, Value]) -> str:
    """The loss, and what is measured beside it."""
    return "  ".join(_texts(values, _OF_OBJECTIVES))


def _texts(values: Mapping[str, Value], formats: Mapping[str, str]) -> list[str]:
    return [text.format(values[name]) for name, text in formats.items() if values.get(name) is not None]


def _describe(values: Mapping[str, Value]) -> str:
    """The metrics of a step for people, in one line."""
    texts = [_objective(values), *_texts(values, _OF_STEPS)]
    if values.get("skipped_steps"):
        texts.append(f"skipped {values['skipped_steps']}")
    return "  ".join([*texts, f"{(values['memory_bytes'] or 0) / GIB:.2f} GiB"])

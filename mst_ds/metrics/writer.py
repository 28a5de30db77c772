"""Takes what a run measures, and hands it to every place that it goes to."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from rich.console import Console

from mst_ds.command_line.entry_point import console as wide_console
from mst_ds.files.whole_file import replace_file
from mst_ds.metrics.display import Display
from mst_ds.metrics.environment import package_versions
from mst_ds.metrics.records import PlannedMemory, Totals, Value, by_phase
from mst_ds.metrics.sinks import JsonLines, Sink, TensorBoard, records_until
from mst_ds.metrics.strict_json import to_json


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
        tensorboard: whether there are TensorBoard's files, too.
        trackers: further sinks of rank 0, see `start_trackers`. A run that fails leaves them open: what ends without
            them is a run that failed, for those who follow it.
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
        tensorboard: bool = True,
        trackers: Sequence[Sink] = (),
        console: Console | None = None,
    ) -> None:
        self._folder = Path(output_dir)
        self._mfu_per_rate = flops_per_token / peak_flops if flops_per_token and peak_flops else None
        self._totals = Totals()
        self._memory: dict[str, dict[str, int]] = {}
        self._sinks: tuple[Sink, ...] = ()
        self._trackers = tuple(trackers)
        if rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            lines = self._folder / "metrics.jsonl"
            earlier = records_until(lines, steps_done)
            for record in earlier:
                self._totals.add_record(record)
            self._sinks = (
                Display(console or wide_console(), max_steps),
                JsonLines(lines, earlier),
                *([TensorBoard(self._folder / "tensorboard", steps_done)] if tensorboard else []),
            )

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks if kind is not None else (*self._sinks, *self._trackers):
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
        metrics: Mapping[str, float] = MappingProxyType({}),
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
            metrics: what the objective measures beside the loss.
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
            **metrics,
        }
        if self._mfu_per_rate is not None:
            values["mfu"] = tokens_per_second * self._mfu_per_rate
        for sink in (*self._sinks, *self._trackers):
            sink.log_step(step, values)

    def log_eval(self, step: int, loss: float, metrics: Mapping[str, float] = MappingProxyType({})) -> None:
        """Logs the loss on the held-out data after `step` optimizer steps, and what is measured beside it."""
        for sink in (*self._sinks, *self._trackers):
            sink.log_eval(step, {"loss": loss, **metrics})

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None:
        """Logs planned and measured memory of the phases of `step`, once in a run."""
        self._memory = by_phase(phases)
        for sink in (*self._sinks, *self._trackers):
            sink.log_memory(step, phases)

    def write_summary(self, fields: Mapping[str, Any]) -> None:
        """Writes `summary.json` at once or not at all: totals of the logged steps, memory, versions and `fields`.

        `fields` (such as the plan) may hold what JSON can; a name that the totals have too takes its place.

        Raises:
            TypeError: `fields` holds what JSON cannot.
            OSError: it cannot be written. An earlier summary stays.
        """
        if self._sinks:
            summary = {**self._totals.summary(), **self._memory, "versions": package_versions(), **fields}
            replace_file(self._folder / "summary.json", to_json(summary, indent=2) + "\n")

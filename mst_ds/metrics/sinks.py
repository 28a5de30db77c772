"""Files that the metrics of a run go to, while it runs: `metrics.jsonl` and `tensorboard/`."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from mst_ds.files.whole_file import replace_file
from mst_ds.metrics.records import PlannedMemory, Value, by_phase
from mst_ds.metrics.strict_json import to_json


class Sink(Protocol):
    """One place that metrics go to."""

    def log_step(self, step: int, values: Mapping[str, Value]) -> None: ...

    def log_eval(self, step: int, values: Mapping[str, Value]) -> None: ...

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None: ...

    def close(self) -> None: ...


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """A disk that is full does not say of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from error


class JsonLines:
    """A JSON object a line. Line-buffered: a run that dies leaves every step that it finished."""

    def __init__(self, path: Path, earlier: Sequence[Mapping[str, Any]]) -> None:
        # A kill in here loses nothing of what an earlier part of the run has logged.
        replace_file(path, "".join(to_json(record) + "\n" for record in earlier))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log_step(self, step: int, values: Mapping[str, Value]) -> None:
        self._write({"step": step, **values})

    def log_eval(self, step: int, values: Mapping[str, Value]) -> None:
        self._write({"step": step, **{f"eval_{name}": value for name, value in values.items()}})

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None:
        self._write({"step": step, **by_phase(phases)})

    def _write(self, record: Mapping[str, Any]) -> None:
        with _naming(self._file.name):
            self._file.write(to_json(record) + "\n")

    def close(self) -> None:
        with _naming(self._file.name):
            self._file.close()


def records_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl` up to this step; a last line that was cut off by a kill is none.

    What else is no record is left out and said so, and the file as it was is kept beside it: a run does not end for
    the sake of a line about steps that it has taken.
    """
    if step == 0 or not path.is_file():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    read = [_record(line) for line in lines]
    damaged = [number for number, record in enumerate(read, start=1) if record is None]
    if damaged:
        kept = path.with_name(path.name + ".damaged")
        shutil.copyfile(path, kept)
        print(
            f"{path} has {len(damaged)} damaged lines, the first is line {damaged[0]}; they stay in {kept}", flush=True
        )
    return [record for record in read if record is not None and record["step"] <= step]


def _record(line: bytes) -> dict[str, Any] | None:
    """What `JsonLines` has written, None of anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or type(record.get("step")) is not int:
        return None
    numbers = ("tokens", "seconds", "memory_bytes", "skipped_steps")
    if "loss" in record and not all(_is_amount(record.get(name)) for name in numbers):
        return None
    if not isinstance(record.get("loss"), int | float | None):
        return None
    return record


def _is_amount(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 2**63  # type: ignore[operator]


class Tagged:
    """A sink whose values have the tags train/…, eval/loss, planned_bytes/… and measured_bytes/…."""

    def log_step(self, step: int, values: Mapping[str, Value]) -> None:
        self._log(step, {f"train/{name}": value for name, value in values.items()})

    def log_eval(self, step: int, values: Mapping[str, Value]) -> None:
        self._log(step, {f"eval/{name}": value for name, value in values.items()})

    def log_memory(self, step: int, phases: Sequence[PlannedMemory]) -> None:
        named = by_phase(phases).items()
        self._log(step, {f"{name}/{phase}": count for name, each in named for phase, count in each.items()})

    def _log(self, step: int, values: Mapping[str, Value]) -> None:
        self.log_tags(step, {name: value for name, value in values.items() if value is not None})

    def log_tags(self, step: int, values: Mapping[str, Value]) -> None:
        """Logs what there is, by tag."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class TensorBoard(Tagged):
    """TensorBoard event files."""

    def __init__(self, folder: Path, steps_done: int) -> None:
        self._folder = str(folder)
        if not isinstance(threading.excepthook, _OfOtherThreads):
            threading.excepthook = _OfOtherThreads(threading.excepthook)
        # purge_step hides the events of later steps that are in this folder.
        with _naming(self._folder):
            self._writer = SummaryWriter(self._folder, purge_step=steps_done + 1 if steps_done else 0)

    def log_tags(self, step: int, values: Mapping[str, Value]) -> None:
        """TensorBoard writes in a thread of its own, whose error the next call of this one raises."""
        with _naming(self._folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with _naming(self._folder):
            self._writer.close()


class _OfOtherThreads:
    """`threading.excepthook` for all threads but TensorBoard's, whose error its writer raises again in ours."""

    def __init__(self, hook: Callable[[threading.ExceptHookArgs], Any]) -> None:
        self._hook = hook

    def __call__(self, args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            self._hook(args)

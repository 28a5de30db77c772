"""Sections that are run one after another, each within a time of its own, whatever becomes of the others."""

from __future__ import annotations

import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch

from benchmarks.gpu.scale import Scale
from benchmarks.measure import free_memory
from mst_ds.config import GIB

Status: TypeAlias = Literal["done", "past its deadline", "failed", "out of memory", "not started"]

# Less than this is not worth a beginning.
_LEAST_SECONDS = 1.0
# A signal can be lost in code that swallows what is raised in it, such as a destructor: it comes again.
_REPEAT_SECONDS = 1.0
_TRACEBACK_LINES = 12


@dataclass(frozen=True)
class Context:
    """What every section measures on, and at which sizes."""

    device: torch.device
    scale: Scale


@dataclass(frozen=True)
class Section:
    """A part of the session.

    Args:
        seconds: that are set aside for it.
        run: fills a mapping with what it measures, as it goes, so that what is measured stays whatever comes.
        keys: what stands in that mapping when all of it is done.
        lines: what people are shown of such a mapping, which may be unfinished.
    """

    name: str
    seconds: float
    run: Callable[[Context, dict[str, Any]], None]
    keys: tuple[str, ...]
    lines: Callable[[Mapping[str, Any]], list[str]]


@dataclass
class Outcome:
    """What became of a section; error: the end of its traceback."""

    status: Status = "not started"
    seconds: float = 0.0
    deadline_seconds: float = 0.0
    error: str | None = None
    results: dict[str, Any] = field(default_factory=dict)


class DeadlinePassed(BaseException):
    """A section's time is over. No `Exception`: code that goes on after any of these must not go on after this."""


def run_sections(
    sections: Sequence[Section],
    context: Context,
    budget_seconds: float,
    after_each: Callable[[Mapping[str, Outcome]], None],
) -> dict[str, Outcome]:
    """Runs them in their order, in the main thread.

    A section has the seconds that are set aside for it, and those that earlier ones have left; all together have the
    budget. `after_each` gets all outcomes so far, by name.
    """
    end = time.monotonic() + budget_seconds
    outcomes: dict[str, Outcome] = {}
    for index, section in enumerate(sections):
        left = end - time.monotonic()
        later = sum(other.seconds for other in sections[index + 1 :])
        outcomes[section.name] = run_section(section, context, min(left, max(section.seconds, left - later)))
        after_each(outcomes)
    return outcomes


def run_section(section: Section, context: Context, seconds: float) -> Outcome:
    """Runs one, for so many seconds at most: what runs on the device then is waited for."""
    outcome = Outcome(deadline_seconds=seconds)
    if seconds < _LEAST_SECONDS:
        outcome.error = "the session's time is over"
        return outcome
    start = time.monotonic()
    try:
        with _deadline(seconds):
            section.run(context, outcome.results)
        outcome.status = "done"
    except DeadlinePassed:
        outcome.status = "past its deadline"
    except torch.OutOfMemoryError as error:
        outcome.status, outcome.error = "out of memory", _end_of_traceback(error)
    except Exception as error:
        outcome.status, outcome.error = "failed", _end_of_traceback(error)
    outcome.seconds = time.monotonic() - start
    _free(context.device, outcome)
    return outcome


def _free(device: torch.device, outcome: Outcome) -> None:
    try:
        free_memory(device)
    except RuntimeError as error:
        # After an error in a kernel every call to the device fails.
        outcome.error = outcome.error or _end_of_traceback(error)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise DeadlinePassed

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _REPEAT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _end_of_traceback(error: BaseException) -> str:
    return "".join("".join(traceback.format_exception(error)).splitlines(keepends=True)[-_TRACEBACK_LINES:]).strip()


def attempt(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` gives, or {"error": …}: one of many measurements may fail, as a kernel that is not there."""
    try:
        return run()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}


def gib(count: int) -> str:
    """Bytes as people read them."""
    return f"{count / GIB:.3g} GiB"


def median(values: Sequence[float]) -> float:
    """NaN where there are none."""
    ordered = sorted(values)
    if not ordered:
        return math.nan
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2

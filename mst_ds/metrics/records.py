"""What a run measures, as numbers: a step's, a phase's, and the sums over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass
class Totals:
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


def by_phase(phases: Sequence[PlannedMemory]) -> dict[str, dict[str, int]]:
    """Bytes of each phase, as files hold them."""
    return {
        "planned_bytes": {each.phase: each.planned for each in phases},
        "measured_bytes": {each.phase: each.measured for each in phases},
    }

"""Steps to log, a writer to log them to, and what its files say."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mst_ds.memory.phases import PhaseMemory
from mst_ds.metrics import MetricsWriter

MEMORY = [PhaseMemory("forward", 2 * 2**30, 2**30), PhaseMemory("backward", 4 * 2**30, 5 * 2**30)]
BY_PHASE = {
    "planned_bytes": {"forward": 2 * 2**30, "backward": 4 * 2**30},
    "measured_bytes": {"forward": 2**30, "backward": 5 * 2**30},
}
STEP: dict[str, Any] = {
    "loss": 2.5,
    "tokens_per_second": 2000.0,
    "grad_norm": 1.5,
    "learning_rate": 1e-3,
    "device_memory_bytes": 3 * 2**30,
    "seconds": 4.0,
    "tokens": 8000,
}


def quiet() -> Console:
    return Console(file=io.StringIO())


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def writer(folder: Path, **options: Any) -> MetricsWriter:
    return MetricsWriter(folder, **{"max_steps": 3, "console": quiet(), **options})


def read_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_events(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]

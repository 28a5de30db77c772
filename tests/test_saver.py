"""When a run saves, and with what; how it is written is that of tests/test_checkpoint.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mst_ds.training import saver
from mst_ds.training.saver import Saver

MAX_STEPS = 5


class Writer:
    def __init__(self) -> None:
        self.saved: list[tuple[int, Any]] = []

    def save(self, engine: Any, *, step: int, data: Any, eval_loss: float | None) -> None:
        assert eval_loss == step / 10
        self.saved.append((step, data))


def run(
    monkeypatch: pytest.MonkeyPatch, *, asked_at: int = 0, other_asked_at: int = 0, **flags: Any
) -> tuple[list[int], int]:
    """The steps that are saved, each of a minute, and the last that is taken; the run, or another rank of it, may be
    asked to stop."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(saver.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(saver.dist, "get_rank", lambda: 3)
    place = SimpleNamespace(step=0)
    monkeypatch.setattr(saver, "any_rank", lambda asked, device: (asked[0] or place.step == other_asked_at, *asked[1:]))
    writer: Any = Writer()
    engine: Any = SimpleNamespace(device=None)
    batches: Any = SimpleNamespace(state_dict=lambda: {"samples_seen": 10 * place.step})
    interruption: Any = SimpleNamespace(signal_name=None)
    each = Saver(engine, batches, writer, interruption, max_steps=MAX_STEPS, **flags)
    for place.step in range(1, MAX_STEPS + 1):
        clock.now += 60
        if place.step == asked_at:
            interruption.signal_name = "SIGTERM"
        if each.after_step(place.step, place.step / 10):
            break
    assert all(data == {"samples_seen": 10 * step} for step, data in writer.saved)
    return [step for step, _ in writer.saved], place.step


@pytest.mark.parametrize(
    ("flags", "saved"),
    [
        ({}, []),
        ({"save_steps": 2}, [2, 4, 5]),
        ({"save_steps": 5}, [5]),
        ({"save_minutes": 3}, [3, 5]),
        ({"save_minutes": 9}, [5]),
        ({"save_steps": 3, "save_minutes": 2}, [2, 3, 5]),
    ],
)
def test_it_saves_when_it_is_due_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], saved: list[int]
) -> None:
    assert run(monkeypatch, **flags) == (saved, MAX_STEPS)


def test_a_run_that_is_asked_to_stop_saves_whatever_else_is_set(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, asked_at=3) == ([3], 3)
    said = "stopped after step 3 by SIGTERM on rank 3; --resume auto goes on\n"
    assert capsys.readouterr().out == said
    assert run(monkeypatch, other_asked_at=2) == ([2], 2)
    assert capsys.readouterr().out == ""

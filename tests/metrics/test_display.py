"""What rank 0 shows, on a terminal and without one."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from logged import MEMORY, STEP, quiet, shown, writer
from rich.console import Console

from mst_ds.config import GIB
from mst_ds.memory.phases import PhaseMemory


def test_without_a_terminal_a_line_comes_every_ten_seconds_of_steps(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=40)
    with writer(tmp_path, max_steps=8, console=console) as metrics:
        for step in range(1, 9):
            metrics.log_step(step, **STEP)  # 4 s each
        metrics.log_eval(8, 1.5)
    lines = shown(console).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step 1/8",
        "step 4/8",
        "step 7/8",
        "step 8/8",
        "step 8: evaluation loss 1.5000",
    ]
    assert lines[1] == ("step 4/8  loss 2.5000  2,000 tokens/s  lr 1.00e-03  grad norm 1.50  3.00 GiB  0:00:16 left")


def test_a_slow_first_step_does_not_spoil_the_time_left(tmp_path: Path) -> None:
    console = quiet()
    with writer(tmp_path, max_steps=100, console=console) as metrics:
        for step, seconds in enumerate([600.0, 2.0, 2.0, 20.0], start=1):
            metrics.log_step(step, **{**STEP, "seconds": seconds})
    assert shown(console).splitlines()[-1].endswith("0:17:36 left")


def test_memory_is_shown_as_a_table_and_the_highest_phase_beside_each_step(tmp_path: Path) -> None:
    console = quiet()
    with writer(tmp_path, max_steps=1, console=console) as metrics:
        metrics.log_memory(1, MEMORY)
        metrics.log_step(1, **STEP)
    text = shown(console)
    rows = [line.replace("│", " ").split() for line in text.splitlines()]
    assert ["forward", "2.000", "1.000", "-50.0%"] in rows
    assert ["backward", "4.000", "5.000", "+25.0%"] in rows
    assert [line for line in text.splitlines() if "warning" in line] == [MEMORY[1].warning]
    assert "3.00 GiB (backward +25% of plan)" in text.splitlines()[-1]


def test_a_first_step_says_why_it_is_below_the_plan(tmp_path: Path) -> None:
    below = PhaseMemory("initialisation", planned=4 * GIB, measured=3 * GIB)
    for memory, is_said in (([below, *MEMORY], True), (MEMORY, False)):
        console = quiet()
        with writer(tmp_path, max_steps=1, console=console) as metrics:
            metrics.log_memory(1, memory)
        assert ("the optimizer's moments are made in it" in shown(console)) is is_said


def test_on_a_terminal_a_bar_shows_the_metrics_and_the_terminal_is_restored(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with pytest.raises(RuntimeError, match="out of memory"), writer(tmp_path, console=console) as metrics:
        metrics.log_step(1, **STEP)
        raise RuntimeError("out of memory")
    text = shown(console)
    for part in ("1/3", "━", "loss 2.5000", "2,000 tokens/s", "grad norm 1.50", "3.00 GiB", "0:00:08 left"):
        assert part in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor: hidden, and shown again

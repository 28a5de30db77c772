"""What rank 0 writes while a run goes on can be read back: by a strict reader of JSON lines, and by TensorBoard."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import pytest
from logged import STEP, read_events, read_lines, writer
from processes import full_disk

from mst_ds.metrics.sinks import JsonLines, TensorBoard


def test_a_step_and_an_evaluation_are_a_json_line_each(tmp_path: Path) -> None:
    with writer(tmp_path / "made" / "here") as metrics:
        metrics.log_step(1, **STEP)
        metrics.log_eval(1, 2.25)
    assert read_lines(tmp_path / "made" / "here") == [
        {
            "step": 1,
            "loss": 2.5,
            "tokens_per_second": 2000.0,
            "grad_norm": 1.5,
            "lr": 1e-3,
            "memory_bytes": 3 * 2**30,
            "seconds": 4.0,
            "tokens": 8000,
            "skipped_steps": 0,
        },
        {"step": 1, "eval_loss": 2.25},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_hold_becomes_null(tmp_path: Path, value: float) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_step(1, **{**STEP, "loss": value, "grad_norm": None})
        metrics.log_eval(1, value)
        metrics.write_summary({"nested": {"list": [value, 1.0]}})
    step, evaluation = read_lines(tmp_path)
    assert (step["loss"], step["grad_norm"], evaluation["eval_loss"]) == (None, None, None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["final_loss"] is None
    assert summary["nested"] == {"list": [None, 1.0]}


def test_a_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        for step in (1, 2):
            metrics.log_step(step, **STEP)
            assert [line["step"] for line in read_lines(tmp_path)] == list(range(1, step + 1))


def test_a_full_disk_says_of_which_file(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", [])
    with full_disk(0):
        for write in (
            lambda: lines.log_eval(1, {"loss": 2.0}),
            lines.close,
        ):  # what could not be written is tried at the end
            with pytest.raises(OSError, match=r"File too large: '.*metrics\.jsonl'"):
                write()


def test_an_error_of_tensorboards_thread_is_raised_and_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    printed: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", printed.append)

    before = set(threading.enumerate())
    sink = TensorBoard(tmp_path / "tensorboard", 0)
    (own,) = set(threading.enumerate()) - before
    with full_disk(0), pytest.raises(OSError, match=r"File too large: '.*tensorboard'"):
        while True:  # until the thread has come to write the first of them
            sink.log_eval(1, {"loss": 2.0})
    own.join()
    assert printed == []
    other = threading.Thread(target=int, args=("x",))
    other.start()
    other.join()
    assert len(printed) == 1


def test_mfu_is_written_where_the_peak_is_known(tmp_path: Path) -> None:
    # 2000 tokens/s of 1e6 FLOPs each are half of 4e9 FLOP/s.
    with writer(tmp_path, flops_per_token=1e6, peak_flops=4e9) as metrics:
        metrics.log_step(1, **STEP)
    assert read_lines(tmp_path)[0]["mfu"] == pytest.approx(0.5)
    with writer(tmp_path, flops_per_token=1e6, peak_flops=None) as metrics:
        metrics.log_step(1, **STEP)
    assert "mfu" not in read_lines(tmp_path)[0]


def test_tensorboard_reads_the_events_back(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_step(1, **STEP)
        metrics.log_step(2, **{**STEP, "loss": 1.25, "grad_norm": None})
        metrics.log_eval(2, 1.5)
    assert read_events(tmp_path, "train/loss") == [(1, 2.5), (2, 1.25)]
    assert read_events(tmp_path, "train/grad_norm") == [(1, 1.5)]
    assert read_events(tmp_path, "train/lr") == [(1, pytest.approx(1e-3)), (2, pytest.approx(1e-3))]
    assert read_events(tmp_path, "eval/loss") == [(2, 1.5)]


@pytest.mark.parametrize(
    "damage",
    [
        *(b"\xff\x00\x10", b"7", b"[1]", b'{"loss": 1.0}', b'{"step": "2"}', b'{"step": 2, "loss": 1.0}', b"[" * 9999),
        b'{"step": 2, "loss": "1.0", "tokens": 1, "seconds": 1, "memory_bytes": 1, "skipped_steps": 0}',
        b'{"step": 2, "loss": 1.0, "tokens": %d, "seconds": 1, "memory_bytes": 1, "skipped_steps": 0}' % 10**400,
        b'{"step": 2, "loss": 1.0, "tokens": 1, "seconds": NaN, "memory_bytes": 1, "skipped_steps": 0}',
    ],
)
def test_a_damaged_line_costs_no_other(tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with writer(tmp_path) as metrics:
        for step in (1, 2, 3):
            metrics.log_step(step, **STEP)
    file = tmp_path / "metrics.jsonl"
    first, *others = file.read_bytes().splitlines(keepends=True)
    before = b"".join([first, damage + b"\n", *others, b'{"step": 3, "lo'])
    file.write_bytes(before)
    with writer(tmp_path, steps_done=2) as metrics:
        metrics.log_step(3, **STEP)
        metrics.write_summary({})
    assert [line["step"] for line in read_lines(tmp_path)] == [1, 2, 3]
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 3
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before
    assert "has 1 damaged lines, the first is line 2" in capsys.readouterr().out

"""What goes to every place that metrics are written to, and the summary; other ranks than the first write nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch
from logged import BY_PHASE, MEMORY, STEP, quiet, read_events, read_lines, shown, writer


def test_a_run_goes_on_after_the_steps_it_has_taken(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_step(1, **STEP)
        metrics.log_step(2, **{**STEP, "loss": math.nan}, is_skipped=True)
        metrics.log_eval(2, 2.25)
        metrics.log_step(3, **{**STEP, "loss": 9.0})
    before = read_lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    with writer(tmp_path, steps_done=2) as metrics:
        metrics.log_step(3, **{**STEP, "loss": 1.0})
        metrics.write_summary({})
    after = read_lines(tmp_path)
    assert after[:-1] == before[:-1]
    assert (after[-1]["step"], after[-1]["loss"], after[-1]["skipped_steps"]) == (3, 1.0, 1)
    assert read_events(tmp_path, "train/loss")[-1] == (3, 1.0)
    summary = json.loads((tmp_path / "summary.json").read_text())
    totals = {name: summary[name] for name in ("first_loss", "final_loss", "steps", "skipped_steps", "tokens")}
    assert totals == {"first_loss": 2.5, "final_loss": 1.0, "steps": 3, "skipped_steps": 1, "tokens": 24000}


def test_a_second_run_in_the_folder_replaces_the_first(tmp_path: Path) -> None:
    for losses in ([9.0, 8.0, 7.0], [5.0]):
        with writer(tmp_path) as metrics:
            for step, loss in enumerate(losses, start=1):
                metrics.log_step(step, **{**STEP, "loss": loss})
    assert [line["loss"] for line in read_lines(tmp_path)] == [5.0]
    assert read_events(tmp_path, "train/loss") == [(1, 5.0)]


def test_memory_by_phase_goes_to_every_file(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_memory(1, MEMORY)
        metrics.write_summary({})
    assert read_lines(tmp_path) == [{"step": 1, **BY_PHASE}]
    for name, of_phases in BY_PHASE.items():
        for phase, count in of_phases.items():
            assert read_events(tmp_path, f"{name}/{phase}") == [(1, float(count))]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {name: summary[name] for name in BY_PHASE} == BY_PHASE


def test_other_ranks_write_and_show_nothing(tmp_path: Path) -> None:
    console = quiet()
    with writer(tmp_path / "run", rank=1, console=console) as metrics:
        metrics.log_step(1, **STEP)
        metrics.log_eval(1, 2.0)
        metrics.log_memory(1, MEMORY)
        metrics.write_summary({"plan": {}})
    assert not (tmp_path / "run").exists()
    assert shown(console) == ""


def test_the_summary_holds_totals_versions_and_the_given_fields(tmp_path: Path) -> None:
    with writer(tmp_path) as metrics:
        metrics.log_step(1, **{**STEP, "loss": 4.0, "device_memory_bytes": 10, "seconds": 6.0})
        metrics.log_step(2, **{**STEP, "loss": 5.0, "device_memory_bytes": 30, "seconds": 1.0})
        metrics.log_step(3, **{**STEP, "loss": 2.0, "device_memory_bytes": 20, "seconds": 1.0})
        metrics.write_summary({"plan": {"mlp_chunks": 4}, "steps": 7})
    summary = json.loads((tmp_path / "summary.json").read_text())
    versions = summary.pop("versions")
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"python", "deepspeed", "transformers"} <= versions.keys()
    assert summary == {
        "first_loss": 4.0,
        "final_loss": 2.0,
        "steps": 7,
        "skipped_steps": 0,
        "tokens": 24000,
        "seconds": 8.0,
        "tokens_per_second": 3000.0,
        "peak_memory_bytes": 30,
        "plan": {"mlp_chunks": 4},
    }


def test_a_summary_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writer(tmp_path) as metrics:
        metrics.write_summary({"attempt": 1})
        with pytest.raises(TypeError, match="not JSON serializable"):
            metrics.write_summary({"attempt": object()})

        def disk_full(file: int) -> None:
            os.ftruncate(file, os.fstat(file).st_size // 2)
            raise OSError("No space left on device")

        monkeypatch.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space"):
            metrics.write_summary({"attempt": 2})
    assert json.loads((tmp_path / "summary.json").read_text())["attempt"] == 1

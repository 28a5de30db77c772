"""What is read from a launch that is over: its status, its error, its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mst_ds.config import GIB
from mst_ds.memory.out_of_memory import OutOfMemoryError, explanation
from mst_ds.planner import make_plan
from mst_ds.resilience.failure import explain
from mst_ds.scaling.outcome import Outcome, judge, read_environment, read_metrics
from mst_ds.scaling.result import DONE, FAILED, OUT_OF_MEMORY, REFUSED, TIMED_OUT

PLAN = make_plan("small_llama", {}, world_size=1, seq_len=1024, device_memory=GIB)
LOST = "mst-train: error: rank 0: " + explain(RuntimeError("Connection closed by peer"), PLAN, 1.0)


def judged(log: str, exit_code: int | None = 1, *, has_begun: bool = True) -> Outcome:
    return judge(exit_code, log, has_begun=has_begun, limit_minutes=2.5)


def test_a_run_that_is_done() -> None:
    assert judged("step 3/3\n", 0) == Outcome(DONE)


@pytest.mark.parametrize(
    "message",
    [
        explanation(OutOfMemoryError(("backward",)), PLAN),
        explanation(OutOfMemoryError(("forward", "loss")), replace(PLAN, device_memory=1)),
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried",
        "MemoryError: ",
    ],
)
def test_memory_that_runs_out_is_known_by_its_words(message: str) -> None:
    found = judged(f"step 1/3\n{LOST}\nmst-train: error: rank 1: {message}\nsrun: error: n1: task 1: Exited\n")
    assert found == Outcome(OUT_OF_MEMORY, f"rank 1: {message}".strip())


def test_slurm_kills_who_takes_more_than_the_job_has() -> None:
    line = "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been OOM Killed."
    assert judged(f"step 1/3\n{line}\nsrun: error: n1: task 0: Out Of Memory\n", 137) == Outcome(OUT_OF_MEMORY, line)


def test_the_rank_that_failed_is_quoted_not_those_that_lost_it() -> None:
    log = f"{LOST}\nmst-train: error: rank 1: ValueError: no\nmst-train: error: rank 2: rank 1 did not answer\n"
    assert judged(log) == Outcome(FAILED, "rank 1: ValueError: no")


@pytest.mark.parametrize("exit_code", [2, 137])
def test_a_refusal_is_that_of_all_ranks_before_the_first_step(exit_code: int) -> None:
    log = "mst-train: error: dataset is 'x'; allowed: y\n"
    assert judged(log, exit_code, has_begun=False) == Outcome(REFUSED, "dataset is 'x'; allowed: y")
    assert judged("mst-train: error: the loss of step 2 is nan\n").status == FAILED
    assert judged("mst-train: error: rank 0: No space left\n", has_begun=False).status == FAILED


def test_a_task_that_becomes_no_rank_is_refused_with_its_reason() -> None:
    log = "rank.sh: error: tasks per node are 2,1; allowed: as many\nsrun: error: n1: task 0: Exited with exit code 2\n"
    assert judged(log, 2, has_begun=False) == Outcome(REFUSED, "tasks per node are 2,1; allowed: as many")


def test_the_time_is_over() -> None:
    assert judged("step 1/3\n", None) == Outcome(TIMED_OUT, "not done after 2.5 minutes")
    found = judged("mst-train: error: rank 1: ValueError: no\n", None)
    assert found == Outcome(TIMED_OUT, "not done after 2.5 minutes; rank 1: ValueError: no")


@pytest.mark.parametrize(("log", "exit_code"), [("step 1/3\n", 247), ("step 1/3\n", 137), ("", -9), (LOST, 1)])
def test_a_rank_that_was_killed_says_nothing(log: str, exit_code: int) -> None:
    found = judged(log, exit_code)
    assert found.died_silently
    assert found.status == FAILED
    watched = judged("mst-train: error: rank 0: rank 1 has ended, whose error tells why\n")
    assert watched.died_silently


def test_other_ends_quote_the_last_line() -> None:
    assert judged("a\n  b \n\n", 3) == Outcome(FAILED, "exit code 3: b")
    assert judged("", 3) == Outcome(FAILED, "exit code 3: nothing was said")


def test_figures_leave_the_first_step_out(tmp_path: Path) -> None:
    records = [
        {"step": 1, "planned_bytes": {"forward": 5}, "measured_bytes": {"forward": 4}},
        *(
            {"step": step, "loss": 9.0 - step, "tokens_per_second": rate, "seconds": 100 / rate, "tokens": 100}
            for step, rate in ((1, 1.0), (2, 10.0), (3, 50.0), (4, 20.0))
        ),
        {"step": 4, "eval_loss": 1.0},
    ]
    text = "".join(json.dumps(record) + "\n" for record in records) + '{"step": 5, "lo'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == {
        "steps": 4,
        "planned_bytes": {"forward": 5},
        "measured_bytes": {"forward": 4},
        "loss": 5.0,
        "tokens_per_step": 100,
        "tokens_per_second": 20.0,
        "step_seconds": 5.0,
    }
    (tmp_path / "metrics.jsonl").write_text("", encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == {"steps": 0}
    assert read_metrics(tmp_path / "none.jsonl") == {}


def test_where_a_run_was(tmp_path: Path) -> None:
    summary = {"steps": 3, "device": "NVIDIA H100", "versions": {"python": "3.11", "torch": "2.9"}}
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    found = read_environment(tmp_path / "summary.json")
    assert found == {"device": "NVIDIA H100", "python": "3.11", "torch": "2.9"}
    assert read_environment(tmp_path / "none.json") == {}

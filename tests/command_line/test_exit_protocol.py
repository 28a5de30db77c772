"""What ranks say when they end is what launchers, sweeps and the scripts of slurm/ read."""

from __future__ import annotations

import re
import subprocess

import pytest
from processes import ROOT

from mst_ds.command_line.exit_protocol import (
    EXIT_REFUSED,
    EXIT_STOPPED,
    TRAIN_COMMAND,
    SaidError,
    another_rank_ended,
    error_line,
    said_errors,
)

CAUSE = error_line(TRAIN_COMMAND, "ValueError: no", rank=1)
CONSEQUENCE = error_line(TRAIN_COMMAND, another_rank_ended("rank 1"), rank=0)
OF_ALL = error_line(TRAIN_COMMAND, "dataset is 'x'; allowed: y")
OF_A_TASK = "rank.sh: error: tasks per node are 2,1; allowed: as many on each"


def test_what_is_said_is_read() -> None:
    log = "\n".join(["step 1/3", CONSEQUENCE, CAUSE, OF_ALL, OF_A_TASK, "srun: error: n1: task 1: Exited"])
    errors = said_errors(log)
    assert [error.text.split()[-1] for error in errors] == ["1)", "no", "y", "each"]
    assert [(error.is_of_one_rank, error.is_consequence) for error in errors] == [
        (True, True),
        (True, False),
        (False, False),
        (False, False),
    ]
    assert errors[1] == SaidError("rank 1: ValueError: no")


def script(name: str) -> str:
    return (ROOT / "slurm" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("stoppable.sh", r"^readonly ASKED_TO_STOP=(\d+)", EXIT_STOPPED),
        ("train.sbatch", r"^  code=(\d+)$", EXIT_STOPPED),
        ("rank.sh", r"^  exit (\d+)$", EXIT_REFUSED),
    ],
)
def test_scripts_end_with_the_same_numbers(name: str, number: str, expected: int) -> None:
    assert {int(found) for found in re.findall(number, script(name), re.MULTILINE)} == {expected}


def test_the_job_shows_the_errors_that_tell_why() -> None:
    """By the program that train.sbatch hands to awk."""
    found = re.search(r"awk '(.*?)' \"\$logs\"", script("train.sbatch"), re.DOTALL)
    assert found
    log = "\n".join(["rank 0 of 2 on n1", CONSEQUENCE, CAUSE, OF_ALL, OF_A_TASK, "step 1/3"])
    done = subprocess.run(["awk", found[1]], input=log, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines() == [CAUSE, OF_ALL, OF_A_TASK]

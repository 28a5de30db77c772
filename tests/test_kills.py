"""A run that is killed again and again ends as one that was not."""

from __future__ import annotations

import contextlib
import random
import signal
from pathlib import Path

import pytest
from test_resume import assert_same_run, losses
from trainings import Training

from mst_ds.checkpoint import newest_checkpoint

FLAGS = ("--max_steps", "150", "--seq_len", "256", "--preflight", "false", "--save_steps", "2", "--resume", "auto")
KILLS = 20
IN_A_SAVE = frozenset({4, 13})  # of the 20


@pytest.mark.timeout(900)
def test_twenty_kills_change_no_loss_and_no_weight(tmp_path: Path) -> None:
    undisturbed = Training(tmp_path / "undisturbed", *FLAGS)
    assert undisturbed.end(limit=300) == [0, 0], undisturbed.output
    run, generator = tmp_path / "run", random.Random(7)
    for kill in range(KILLS):
        training = Training(run, *FLAGS)
        rank = generator.randrange(2)
        if kill in IN_A_SAVE:
            kill_in_a_save(training, rank)
        else:
            kill_after(training, rank, steps=generator.randrange(1, 6))
        codes = training.end(limit=60)
        assert codes[rank] == -signal.SIGKILL
        assert not [*Path("/dev/shm").glob(f"*_{training.port}_*")]
        assert codes[1 - rank] == 1
        assert f"train.py: error: rank {1 - rank}: " in training.output
    last = Training(run, *FLAGS)
    assert last.end(limit=300) == [0, 0], last.output
    assert "goes on after step" in last.output
    assert len(losses(run)) == 150
    assert_same_run(run, tmp_path / "undisturbed")


def kill_after(training: Training, rank: int, *, steps: int) -> None:
    """Once it has taken so many steps."""
    checkpoint = newest_checkpoint(training.output_dir / "checkpoints")
    last = (0 if checkpoint is None else checkpoint.step) + steps

    def is_there() -> bool:
        # Until the first step what an earlier run has logged may still be there.
        has_begun = "memory of step" in training.output
        return has_begun and any(step >= last for step, _ in losses(training.output_dir))

    assert training.wait_for(is_there), training.output
    training.send(rank, signal.SIGKILL)


def kill_in_a_save(training: Training, rank: int) -> None:
    """With both ranks held still, so that the save that is going on cannot end before the kill."""
    folder = training.output_dir / "checkpoints"

    def unfinished() -> set[tuple[str, int]]:
        found = set()
        for path in folder.glob("step-*.partial"):
            with contextlib.suppress(FileNotFoundError):  # which has just got its last name
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    of_earlier_kills = unfinished()
    while True:
        assert training.wait_for(lambda: bool(unfinished() - of_earlier_kills)), training.output
        for each in (0, 1):
            training.send(each, signal.SIGSTOP)
        if unfinished() - of_earlier_kills:
            break
        for each in (0, 1):
            training.send(each, signal.SIGCONT)
    training.send(rank, signal.SIGKILL)
    training.send(1 - rank, signal.SIGCONT)

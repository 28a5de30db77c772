"""A run that is killed again and again ends as one that was not.

Of the slow ones `--kills 30` tries as many more, on runs of all kinds.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import ROOT
from trainings import Training, assert_same_weights

from mst_ds.checkpoint import newest_checkpoint

FLAGS = ("--seq_len", "256", "--preflight", "false", "--save_steps", "2", "--resume", "auto")
KILLS_OF_A_RUN = 3
LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj", "up_proj"]}


@dataclass(frozen=True)
class Setup:
    """A run, and what happens to it. It has two ranks, if need be one after the first kill.

    ends: its `max_steps`, and the longer one with which it then goes on; one for none.
    kills: of each of these, `in_a_save` the numbers of those that come in a save.
    """

    stage: int = 3
    dtype: str = "fp32"
    has_adapters: bool = False
    accumulation: int = 1
    eval_steps: int = 0
    ends: tuple[int, ...] = (20,)
    kills: tuple[int, ...] = (2,)
    in_a_save: frozenset[int] = frozenset({1})
    changes_world: bool = False
    seed: int = 7

    @classmethod
    def at_random(cls, number: int) -> Setup:
        generator = random.Random(number)
        stage = number % 4
        grows = generator.random() < 0.5
        dtype = "bf16" if stage > 0 and generator.random() < 0.5 else "fp32"
        return cls(
            stage=stage,
            dtype=dtype,
            has_adapters=generator.random() < 0.4,
            accumulation=generator.choice([1, 2]),
            eval_steps=generator.choice([0, 3]),
            ends=(40, 70) if grows else (60,),
            kills=(2, KILLS_OF_A_RUN - 2) if grows else (KILLS_OF_A_RUN,),
            # Not the first: a run that goes on from nothing shows nothing.
            in_a_save=frozenset({generator.randrange(1, KILLS_OF_A_RUN)}),
            changes_world=dtype == "fp32" and generator.random() < 0.5,
            seed=number,
        )

    def flags(self, folder: Path) -> list[str]:
        ds_config = json.loads((ROOT / "ds_configs" / "zero3_mst.json").read_text(encoding="utf-8"))
        ds_config["zero_optimization"]["stage"] = self.stage
        ds_config["bf16"]["enabled"] = self.dtype == "bf16"
        ds_config["gradient_accumulation_steps"] = self.accumulation
        (folder / "ds.json").write_text(json.dumps(ds_config), encoding="utf-8")
        (folder / "adapter_config.json").write_text(json.dumps(LORA), encoding="utf-8")
        flags = ["--ds_config", str(folder / "ds.json"), "--eval_steps", str(self.eval_steps)]
        return [*FLAGS, *flags, *(["--peft_config", str(folder)] if self.has_adapters else [])]


# What a run is killed with is in one of these or the other.
ONE_OF_EACH = Setup()
OTHERWISE = Setup(stage=2, dtype="bf16", has_adapters=True, accumulation=2, eval_steps=3)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "setup" in metafunc.fixturenames:
        more = metafunc.config.getoption("kills") // KILLS_OF_A_RUN
        longer = (OTHERWISE, *map(Setup.at_random, range(more)))
        slow = [pytest.param(setup, marks=pytest.mark.slow, id=str(setup)) for setup in longer]
        metafunc.parametrize("setup", [pytest.param(ONE_OF_EACH, id="one of each"), *slow])


@pytest.mark.timeout(900)
def test_kills_change_no_loss_and_no_weight(tmp_path: Path, setup: Setup) -> None:
    flags = setup.flags(tmp_path)
    whole, run = tmp_path / "whole", tmp_path / "run"
    generator = random.Random(setup.seed)
    ranks, number = 2, 0
    for end, kills in zip(setup.ends, setup.kills, strict=True):
        finish(whole, 2, *flags, "--max_steps", str(end))
        for _ in range(kills):
            training = Training(run, *flags, "--max_steps", str(end), ranks=ranks)
            kill(training, generator, is_in_a_save=number in setup.in_a_save)
            number += 1
            ranks = 3 - ranks if setup.changes_world else ranks
        last = finish(run, ranks, *flags, "--max_steps", str(end))
        assert "goes on after step" in last.output
    expected, found = logged(whole), logged(run)
    assert [name for name, _ in found] == [name for name, _ in expected]
    if setup.changes_world:
        # What sums of fp32 in another order come to.
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], abs=1e-5)
    else:
        assert found == expected
        file = "adapter_model.safetensors" if setup.has_adapters else "model.safetensors"
        assert_same_weights(run, whole, file)


def finish(output_dir: Path, ranks: int, *flags: str) -> Training:
    training = Training(output_dir, *flags, ranks=ranks)
    assert training.end(limit=300) == [0] * ranks, training.output
    return training


def logged(output_dir: Path) -> list[tuple[tuple[int, str], float]]:
    """Losses and rates by step and name; a last line that is being written does not count."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    names = ("loss", "lr", "eval_loss")
    return [
        ((record["step"], name), record[name]) for record in map(json.loads, lines) for name in names if name in record
    ]


def kill(training: Training, generator: random.Random, *, is_in_a_save: bool) -> None:
    ranks = len(training.processes)
    rank = generator.randrange(ranks)
    if is_in_a_save:
        kill_in_a_save(training, rank)
    else:
        kill_after(training, rank, steps=generator.randrange(3, 8))
    codes = training.end(limit=60)
    assert codes[rank] == -signal.SIGKILL
    assert not [*Path("/dev/shm").glob(f"*_{training.port}_*")]
    for other in set(range(ranks)) - {rank}:
        assert codes[other] == 1
        assert f"mst-train: error: rank {other}: " in training.output


def kill_after(training: Training, rank: int, *, steps: int) -> None:
    """Once it has taken so many steps."""
    checkpoint = newest_checkpoint(training.output_dir / "checkpoints")
    last = (0 if checkpoint is None else checkpoint.step) + steps

    def is_there() -> bool:
        # Until the first step what an earlier run has logged may still be there.
        has_begun = "memory of step" in training.output
        return has_begun and any(step >= last for (step, _), _ in logged(training.output_dir))

    assert training.wait_for(is_there), training.output
    training.send(rank, signal.SIGKILL)


def kill_in_a_save(training: Training, rank: int) -> None:
    """With all ranks held still, so that the save that is going on cannot end before the kill."""
    folder = training.output_dir / "checkpoints"
    ranks = range(len(training.processes))

    def unfinished() -> set[tuple[str, int]]:
        found = set()
        for path in folder.glob("step-*.partial"):
            with contextlib.suppress(FileNotFoundError):  # which has just got its last name
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    of_earlier_kills = unfinished()
    while True:
        assert training.wait_for(lambda: bool(unfinished() - of_earlier_kills)), training.output
        for each in ranks:
            training.send(each, signal.SIGSTOP)
        if unfinished() - of_earlier_kills:
            break
        for each in ranks:
            training.send(each, signal.SIGCONT)
    training.send(rank, signal.SIGKILL)
    for each in set(ranks) - {rank}:
        training.send(each, signal.SIGCONT)

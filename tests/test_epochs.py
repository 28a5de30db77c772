"""The length of a run in epochs: known once the samples are there, and from then on as if given in steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trainings import FLAGS, Training, assert_same_run, losses

from mst_ds.config_parser import parse_train_config
from mst_ds.data import load_training_data
from mst_ds.engine import Launch, Run, prepare, with_steps_of_epochs

SCHEDULER = {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}


def texts(folder: Path, num_samples: int) -> str:
    """So many samples of 64 bytes, but for the last, which is of 63."""
    file = folder / "text.txt"
    file.write_text("x" * (64 * num_samples - 2), encoding="utf-8")
    return str(file)


def settled(folder: Path, epochs: str, *flags: str, num_samples: int = 30, **keys: Any) -> Run:
    """A run of three samples a step."""
    json_file = folder / "ds.json"
    json_file.write_text(json.dumps({"gradient_accumulation_steps": 3, **keys}), encoding="utf-8")
    given = ["--dataset", texts(folder, num_samples), "--seq_len", "64", "--preflight", "false"]
    given += ["--ds_config", str(json_file), "--num_train_epochs", epochs, *flags]
    run = prepare(parse_train_config(given), Launch.from_environment())
    return with_steps_of_epochs(run, load_training_data(run.config, run.tokenizer))


@pytest.mark.parametrize(
    ("epochs", "num_samples", "steps"),
    [("1", 30, 10), ("1", 31, 11), ("2", 31, 21), ("0.1", 30, 1), ("2.2", 45, 33), ("1e-5", 30, 1)],
)
def test_steps_are_those_that_the_samples_take(tmp_path: Path, epochs: str, num_samples: int, steps: int) -> None:
    assert settled(tmp_path, epochs, num_samples=num_samples).config.max_steps == steps


def test_the_schedule_of_the_json_is_told(tmp_path: Path) -> None:
    run = settled(tmp_path, "2", scheduler=SCHEDULER)
    assert run.config.num_warmup_steps == 2
    params = run.ds_config["scheduler"]["params"]
    assert (params["total_num_steps"], params["warmup_num_steps"]) == (20, 2)


def test_a_schedule_of_another_length_in_the_json_is_refused(tmp_path: Path) -> None:
    scheduler = {"type": "WarmupDecayLR", "params": {"total_num_steps": 2}}
    with pytest.raises(ValueError, match=r"num_train_epochs is 2.0 by the flag, but scheduler.params.total_num_steps"):
        settled(tmp_path, "2", scheduler=scheduler)


def test_a_warm_up_longer_than_the_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"warmup_steps is 11; allowed: 0 to max_steps \(10\)"):
        settled(tmp_path, "1", "--warmup_steps", "11")


@pytest.mark.slow
def test_a_run_of_epochs_is_that_of_as_many_steps_and_goes_on(tmp_path: Path) -> None:
    def finish(name: str, *flags: str) -> Training:
        training = Training(tmp_path / name, *others, *flags)
        assert training.end(limit=300) == [0, 0], training.output
        return training

    others = ["--dataset", texts(tmp_path, 24), *FLAGS[2:]]  # 6 samples of 256, one a step
    finish("steps", "--max_steps", "9")
    finish("epochs", "--num_train_epochs", "1.5")
    assert_same_run(tmp_path / "epochs", tmp_path / "steps")

    checkpoint = tmp_path / "steps" / "checkpoints" / "step-00000006"
    finish("parts", "--num_train_epochs", "1.5", "--resume", str(checkpoint))
    assert losses(tmp_path / "parts") == [each for each in losses(tmp_path / "steps") if each[0] > 6]
    shorter = Training(tmp_path / "shorter", *others, "--num_train_epochs", "0.5", "--resume", str(checkpoint))
    assert shorter.end() == [2, 2]
    assert f"max_steps is 3, but {checkpoint} is of step 6" in shorter.output

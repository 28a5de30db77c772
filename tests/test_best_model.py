"""`--load_best_model_at_end`: which checkpoint is the best, that it is kept, and that the model is its."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import DATA, identity_of, resumable, rewrite_state, step
from distributed import run_ranks
from safetensors.torch import load_file
from steps import build_engine
from test_loop import take_steps
from tiny import tiny_llama
from trainings import FLAGS, Training, assert_same_weights

from mst_ds.checkpoint import CheckpointWriter, load_best, newest_checkpoint, read_checkpoint
from mst_ds.checkpoint.export import export_checkpoint, export_model
from mst_ds.checkpoint.save import names_to_remove
from mst_ds.config_parser import parse_train_config
from mst_ds.data.tokenizer import byte_tokenizer
from mst_ds.training import loop

BEST = ("--load_best_model_at_end", "true")


@pytest.mark.parametrize(
    ("save_steps", "eval_steps", "is_allowed"),
    [(20, 10, True), (10, 10, True), (0, 10, False), (20, 0, False), (15, 10, False), (10, 20, False), (0, 0, False)],
)
def test_what_is_saved_must_have_been_evaluated(save_steps: int, eval_steps: int, is_allowed: bool) -> None:
    flags = [*BEST, "--save_steps", str(save_steps), "--eval_steps", str(eval_steps)]
    if is_allowed:
        assert parse_train_config(flags).load_best_model_at_end
    else:
        with pytest.raises(
            ValueError, match=f"is true, but save_steps is {save_steps} and eval_steps is {eval_steps};"
        ):
            parse_train_config(flags)


@pytest.mark.parametrize(
    ("keep", "best", "kept"),
    [
        (2, None, "cd"),
        (2, "d", "cd"),
        (2, "c", "cd"),
        (2, "a", "ad"),
        (1, "a", "ad"),
        (1, "d", "d"),
        (3, "a", "acd"),
        (9, "a", "abcd"),
    ],
)
def test_the_best_and_the_newest_are_kept(keep: int, best: str | None, kept: str) -> None:
    assert names_to_remove("abcd", keep=keep, best=best) == [name for name in "abcd" if name not in kept]


def test_the_loop_tells_of_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, float | None]] = []
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: loop.StepResult(1.0, 1.0, 1.0, True))
    monkeypatch.setattr(loop, "compare", lambda plan, peaks, device: peaks)
    monkeypatch.setattr(loop, "evaluate", lambda *_: (0.5, {}))
    monkeypatch.setattr("test_loop.Logged.log_eval", lambda *_: None, raising=False)
    after_step: Any = lambda *result: told.append(result)  # noqa: E731 - None is no wish to stop
    take_steps(3, held_out=[SimpleNamespace()], eval_steps=2, after_step=after_step)
    assert told == [(1, None), (2, 0.5), (3, 0.5)]


def train_and_load_best(rank: int, folder: Path, stage: int) -> int:
    """Four steps, of which the second has the lowest loss; then the model is that of the second."""
    engine = build_engine(tiny_llama(), **resumable(stage))
    identity = identity_of(engine.module.config, stage)
    writer = CheckpointWriter(folder / "checkpoints", 1, identity, byte_tokenizer(), "small_llama", keeps_best=True)
    for number, loss in enumerate((2.0, 1.0, None, math.nan), start=1):
        step(engine, number)
        writer.save(engine, step=number, data=DATA, eval_loss=loss)
    best = load_best(engine, folder / "checkpoints", step=4, seed=0)
    export_model(engine, byte_tokenizer(), folder / "model", source="small_llama")
    assert best is not None
    return best.step


def load_best_elsewhere(rank: int, folder: Path, stage: int) -> None:
    """An engine of another number of ranks, which was not made to go on from that checkpoint."""
    engine = build_engine(tiny_llama(), **resumable(stage))
    step(engine, 9)
    assert load_best(engine, folder / "no-checkpoints", step=1, seed=0) is None
    load_best(engine, folder / "checkpoints", step=1, seed=0)
    export_model(engine, byte_tokenizer(), folder / "elsewhere", source="small_llama")


def test_the_model_is_that_of_the_best_step(tmp_path: Path) -> None:
    # What only this protects: ZeRO-3 going back to a checkpoint in the middle of a run, with the ranks of the run or
    # with another number of them.
    assert run_ranks(train_and_load_best, 2, tmp_path, 3) == [2, 2]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000002", "step-00000004"]
    losses = [read_checkpoint(path).eval_loss for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert losses == [1.0, None]
    best = read_checkpoint(tmp_path / "checkpoints" / "step-00000002")
    export_checkpoint(best, tmp_path / "best")
    run_ranks(load_best_elsewhere, 1, tmp_path, 3)
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in ("best", "model", "elsewhere")}
    for name, weight in weights["best"].items():
        assert weight.equal(weights["model"][name]), name
        assert weight.equal(weights["elsewhere"][name]), name
    # As an earlier version wrote it.
    rewrite_state(best.folder, lambda state: state.pop("eval_loss"))
    assert read_checkpoint(best.folder).eval_loss is None


def evaluate_and_export(rank: int, folder: Path) -> None:
    """As a run of preferences does: what its reference gives, steps, an evaluation, and its model."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1000}
    engine = build_engine(tiny_llama(), zero_optimization=zero)
    for forwards, steps in ((2, 2), (1, 1), (1, 0)):
        engine.eval()
        with torch.no_grad():
            for _ in range(forwards):
                engine(input_ids=torch.arange(8)[None])
        engine.train()
        for number in range(steps):
            step(engine, number)
    export_model(engine, byte_tokenizer(), folder, source="small_llama")


def test_a_model_is_written_after_an_evaluation(tmp_path: Path) -> None:
    """Forwards without a backward leave parameters on their way that ZeRO-3 has fetched ahead."""
    run_ranks(evaluate_and_export, 2, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_run_that_goes_on_ends_with_the_best_model_of_its_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = [*FLAGS, *BEST, "--eval_steps", "3", "--eval_samples", "2", "--save_total_limit", "1"]
    # The rate becomes so high that what was learned is lost.
    flags += ["--learning_rate", "0.3", "--lr_scheduler_type", "constant_with_warmup", "--warmup_steps", "6"]
    first = Training(run, *flags, "--max_steps", "6")
    assert first.end() == [0, 0], first.output
    on = Training(run, *flags, "--resume", "auto")
    assert on.end() == [0, 0], on.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    assert list(losses) == [3, 6, 9, 12]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    best = min(losses, key=losses.__getitem__)
    assert best < 12, losses
    assert (summary["best_step"], summary["best_eval_loss"]) == (best, losses[best])
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert newest.step == 12
    export_checkpoint(read_checkpoint(run / "checkpoints" / f"step-{best:08d}"), tmp_path / "best" / "model")
    assert_same_weights(run, tmp_path / "best")

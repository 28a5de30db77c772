"""A run that is killed, asked to stop, or moved to other ranks goes on as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from processes import ROOT, assert_ended
from trainings import FLAGS, LIMIT, Training, assert_same_run, command, losses, with_mesh

from mst_ds.checkpoint import Identity, newest_checkpoint
from mst_ds.command_line.exit_protocol import EXIT_STOPPED
from mst_ds.config import TrainConfig
from mst_ds.config_parser import parse_train_config
from mst_ds.engine import Launch, prepare
from mst_ds.engine.preparation import _kept_settings, _settled
from mst_ds.planner import read_request, settle_sp_size

GO_ON = ("--resume", "auto")


def finish(output_dir: Path, *flags: str, ranks: int = 2) -> Training:
    training = Training(output_dir, *FLAGS, *flags, ranks=ranks)
    assert training.end(limit=300) == [0] * ranks, training.output
    return training


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(folder)
    return folder


def test_a_run_keeps_its_newest_checkpoints(uninterrupted: Path) -> None:
    assert sorted(os.listdir(uninterrupted / "checkpoints")) == ["step-00000009", "step-00000012"]


@pytest.mark.slow
def test_a_run_that_is_done_changes_nothing_more(uninterrupted: Path, tmp_path: Path) -> None:
    shutil.copytree(uninterrupted, tmp_path / "run")
    again = finish(tmp_path / "run", *GO_ON)
    assert "goes on after step 12" in again.output
    assert_same_run(tmp_path / "run", uninterrupted)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    first = Training(tmp_path / "run", *FLAGS, "--save_steps", "0")
    assert first.wait_for(lambda: "memory of step 1," in first.output), first.output
    first.send(1, signal.SIGTERM)
    assert first.end() == [EXIT_STOPPED] * 2, first.output
    assert "by SIGTERM on rank 1; --resume auto goes on" in first.output
    finish(tmp_path / "run", *GO_ON)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_signal_before_the_first_step_is_not_lost(uninterrupted: Path, tmp_path: Path) -> None:
    first = Training(tmp_path / "run", *FLAGS)
    assert first.wait_for(lambda: first.blocks(0, signal.SIGUSR1)), first.output
    first.send(0, signal.SIGUSR1)
    assert first.end() == [EXIT_STOPPED] * 2, first.output
    assert "by SIGUSR1 on rank 0; --resume auto goes on" in first.output
    assert [step for step, _ in losses(tmp_path / "run")] == [1]
    finish(tmp_path / "run", *GO_ON)
    assert_same_run(tmp_path / "run", uninterrupted)


class Launched:
    """A run that DeepSpeed's launcher starts; what it prints, when it has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    @property
    def ranks(self) -> list[psutil.Process]:
        """The training processes, below the launcher's two, by rank."""
        found: dict[int, psutil.Process] = {}
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # one that was started for a moment
                if child.cmdline()[2:3] == ["launch/train.py"]:
                    found.setdefault(int(child.environ()["RANK"]), child)
        return [found[rank] for rank in sorted(found)]

    def wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + LIMIT
        while not path.exists():
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline, f"{path} was not made"
            time.sleep(0.01)  # looks again, until it is there

    def end(self, *, limit: float) -> str:
        return self.process.communicate(timeout=limit)[0]


@contextlib.contextmanager
def launched(output_dir: Path, *flags: str) -> Iterator[Launched]:
    process = subprocess.Popen(
        command(output_dir, *flags),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield Launched(process)
    finally:
        for each in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "launch/train.py" in each.cmdline():
                    each.kill()
        process.communicate()


def first_error(output: str) -> str:
    return next(line for line in output.splitlines() if line.startswith("mst-train: error: "))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_which_goes_on(uninterrupted: Path, tmp_path: Path) -> None:
    with launched(tmp_path / "run") as run:
        run.wait_for(tmp_path / "run" / "checkpoints" / "step-00000003")
        ranks = run.ranks
        ranks[0].kill()
        output = run.end(limit=60)
    assert run.process.returncode != 0
    assert "rank 1: another rank has ended, whose error tells why" in first_error(output)
    assert_ended(ranks)
    finish(tmp_path / "run", *GO_ON)
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_named_and_ends_the_run(tmp_path: Path) -> None:
    with launched(tmp_path / "run", "--max_steps", "1000", "--hang_timeout", "10") as run:
        run.wait_for(tmp_path / "run" / "checkpoints" / "step-00000003")
        ranks = run.ranks
        ranks[1].suspend()
        output = run.end(limit=LIMIT)
    assert run.process.returncode == 1
    assert "rank 0: rank 1 did not answer within 10 s; --hang_timeout" in first_error(output)
    assert_ended(ranks)


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_run_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with launched(tmp_path) as run:
        output = run.end(limit=LIMIT)
    assert run.process.returncode == 1
    assert "rank 0: [Errno 21] Is a directory" in first_error(output)


def test_ranks_that_see_different_checkpoints_do_not_begin(uninterrupted: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "run", tmp_path / "other"]
    for folder in folders:
        shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folders[1] / "checkpoints" / "step-00000012")
    training = Training(tmp_path / "run", *FLAGS, *GO_ON, own_flags={1: ["--output_dir", str(folders[1])]})
    assert training.end() == [1, 1]
    assert "rank 0 goes on from (12, " in first_error(training.output)
    assert "allowed: a folder that all ranks see" in first_error(training.output)


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_does_not_begin(tmp_path: Path) -> None:
    first = Training(tmp_path / "run", *FLAGS, "--max_steps", "100000", "--save_steps", "0")
    assert first.wait_for(lambda: "memory of step 1," in first.output), first.output
    second = subprocess.run(
        [sys.executable, "launch/train.py", *FLAGS, "--output_dir", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert second.returncode == 2
    assert "is that of a run which is going on; allowed: another output_dir" in second.stderr
    assert all(process.exitcode is None for process in first.processes)
    first.kill()


@pytest.mark.slow
@pytest.mark.parametrize("kills_inner", [False, True])
def test_a_launcher_that_is_killed_takes_the_ranks_with_it(tmp_path: Path, kills_inner: bool) -> None:
    with launched(tmp_path / "run", "--max_steps", "100000", "--save_steps", "0") as run:
        run.wait_for(tmp_path / "run" / "metrics.jsonl")
        ranks = run.ranks
        inner = ranks[0].parent()
        assert inner is not None
        if kills_inner:
            inner.kill()
        run.process.terminate()
        assert_ended(ranks)
        output = run.end(limit=60)
    assert "the process that started this one has ended" in first_error(output)


def test_the_jsons_optimizer_must_be_the_same(tmp_path: Path) -> None:
    """A checkpoint holds it, so that another would be without effect."""

    def identity(rate: float) -> Identity:
        params = {"lr": rate, "betas": "auto", "eps": "auto", "weight_decay": 0.1, "torch_adam": True}
        path = tmp_path / "ds.json"
        path.write_text(json.dumps({"optimizer": {"type": "AdamW", "params": params}}), encoding="utf-8")
        return prepare(parse_train_config([*FLAGS, "--ds_config", str(path)]), Launch.from_environment({})).identity

    identity(1e-3).require_same(identity(1e-3), tmp_path)
    with pytest.raises(ValueError, match=r"training\.optimizer\.params\.lr 0\.001, but this run has 0\.002"):
        identity(2e-3).require_same(identity(1e-3), tmp_path)


@pytest.mark.parametrize(
    ("objective", "name", "value"),
    [("dpo", "beta", 0.3), ("dpo", "label_smoothing", 0.2), ("simpo", "gamma_beta_ratio", 0.1)]
    + [("kto", f"{name}_weight", 0.5) for name in ("desirable", "undesirable")],
)
def test_an_objective_goes_on_as_it_began(tmp_path: Path, objective: str, name: str, value: float) -> None:
    before, now = (
        _kept_settings(config, SimpleNamespace(samples_per_step=1), {})
        for config in (TrainConfig(objective=objective), TrainConfig(objective=objective, **{name: value}))
    )
    before, now = (Identity({}, None, "", "fp32", 3, settings) for settings in (before, now))
    with pytest.raises(ValueError, match=rf"training\.{name} .*, but this run has {value}"):
        now.require_same(before, tmp_path)


def test_a_step_keeps_its_samples() -> None:
    """Ranks to a sequence that are left to the planner are those of before; where none give as many, a fresh choice."""
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    asked = read_request("small_llama", ds_config, world_size=8, seq_len=4096, device_memory=2**34)
    fresh = settle_sp_size(asked).topology.dp_size
    for samples, expected in ((2, 2), (4, 4), (8, 8), (3, fresh)):
        identity = SimpleNamespace(training={"samples of a step": samples})
        assert _settled(asked, SimpleNamespace(identity=identity)).topology.dp_size == expected


MESH_FLAGS = ("--lr_scheduler_type", "constant", "--save_total_limit", "4")


@pytest.fixture(scope="module")
def four_samples_a_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of sp 2, dp 1, whose layers are worked through in 4 chunks."""
    folder = tmp_path_factory.mktemp("mesh")
    finish(folder / "run", *MESH_FLAGS, "--ds_config", with_mesh(folder, sp_size=2, accumulation=4, layer_chunks=4))
    return folder / "run"


@pytest.mark.slow
@pytest.mark.parametrize(("sp_size", "dp_size", "layer_chunks"), [(1, 1, 1), (1, 2, 2), (4, 1, 3)])
def test_another_mesh_goes_on(
    four_samples_a_step: Path, tmp_path: Path, sp_size: int, dp_size: int, layer_chunks: int
) -> None:
    ds_config = with_mesh(tmp_path, sp_size=sp_size, accumulation=4 // dp_size, layer_chunks=layer_chunks)
    flags = ["--resume", str(four_samples_a_step / "checkpoints" / "step-00000003"), "--ds_config", ds_config]
    finish(tmp_path / "run", *MESH_FLAGS, *flags, ranks=sp_size * dp_size)
    expected, found = losses(four_samples_a_step)[3:], losses(tmp_path / "run")
    assert [step for step, _ in found] == [step for step, _ in expected] == list(range(4, 13))
    # What sums of fp32 in another order come to in nine steps: 1e-6 and less, at a rate at which weights do move.
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], abs=1e-5)
    assert not (four_samples_a_step / "checkpoints" / "step-00000003" / "universal").exists()
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert newest.data["samples_seen"] == 12 * 4

"""The folder of a run: claimed before tokens are made, and given back where nothing was written."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from mst_ds import engine
from mst_ds.commands import train
from mst_ds.config_parser import parse_train_config
from mst_ds.engine import claimed, require_same_checkpoint, resume


def end_by_a_signal(folder: Path, written: str | None) -> None:
    with claimed(folder):
        if written is not None:
            (folder / written).touch()
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("written", [None, "metrics.jsonl"])
def test_a_signal_gives_back_what_is_empty(tmp_path: Path, written: str | None) -> None:
    process = multiprocessing.get_context("fork").Process(target=end_by_a_signal, args=(tmp_path / "run", written))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGTERM
    assert (tmp_path / "run").exists() == (written is not None)


def test_afterwards_signals_do_what_they_did(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with claimed(tmp_path / "run"):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_another_run_has_left_meanwhile_is_not_overwritten(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    @contextmanager
    def claimed_after_another_run(folder: Path) -> Iterator[None]:
        folder.mkdir()
        (folder / "summary.json").touch()
        with FileLock(folder / ".lock", timeout=0):
            yield

    monkeypatch.setattr(engine, "claimed", claimed_after_another_run)
    text = tmp_path / "text.txt"
    text.write_text("some text " * 20, encoding="utf-8")
    flags = {"dataset": text, "seq_len": 64, "preflight": "false", "output_dir": tmp_path / "run"}
    assert train.main([f"--{name}={value}" for name, value in flags.items()]) == 2
    assert "has the summary.json of a run that is done" in capfd.readouterr().err


@pytest.mark.parametrize(("before", "now"), [(None, 20), (10, 20), (10, None)])
def test_a_run_goes_on_from_the_checkpoint_that_it_was_checked_with(
    monkeypatch: pytest.MonkeyPatch, before: int | None, now: int | None
) -> None:
    def of_step(step: int | None) -> Any:
        return None if step is None else SimpleNamespace(step=step)

    monkeypatch.setattr(resume, "find_checkpoint", lambda config: of_step(now))
    config = parse_train_config([])
    require_same_checkpoint(config, of_step(now))
    with pytest.raises(ValueError, match=r"^output_dir had .* when this run began, and now has .*; allowed: the same"):
        require_same_checkpoint(config, of_step(before))

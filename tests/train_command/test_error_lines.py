"""An error of mst-train is one line, said once by one rank; a mistake of ours shows its traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch.distributed as dist
from processes import ROOT
from refusals import only_line

from mst_ds.command_line.entry_point import RequestError, one_line
from mst_ds.commands import train
from mst_ds.engine import Launch, meeting

SCRIPT = ROOT / "launch" / "train.py"


def test_as_a_command() -> None:
    command = [sys.executable, str(SCRIPT), "--ds_config", "missing.json"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "'missing.json'" in only_line(done.stderr)


def test_two_ranks_say_it_once() -> None:
    command = ["deepspeed", "--num_gpus", "2", str(SCRIPT), "--seq_len", "0"]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("mst-train: error")]
    assert len(said) == 1
    assert "seq_len is 0" in said[0]


def test_another_rank_lets_the_first_of_its_node_speak(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    order = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(train.time, "sleep", lambda seconds: order.append((seconds, capfd.readouterr())))
    assert train.main(["--seq_len", "0"]) == 2
    assert order == [(10.0, ("", ""))], "it spoke before it waited"
    # The launcher would have ended it by now; it was not, so the error is this rank's alone.
    assert "seq_len is 0" in only_line(capfd.readouterr().err)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RecursionError("x"), OverflowError("x")])
def test_what_a_request_may_raise(
    error: Exception, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(argv: object) -> None:
        raise error

    monkeypatch.setattr(train, "parse_train_config", raises)
    assert refused() == f"{one_line(error)}\n"


def test_a_mistake_of_ours_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "parse_train_config", None)
    with pytest.raises(TypeError):
        train.main([])


def test_ranks_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def wait_in_vain(**kwargs: Any) -> None:
        raise dist.DistStoreError("Timed out after 3 seconds waiting for clients. 1/2 clients joined.")

    monkeypatch.setattr(deepspeed, "init_distributed", wait_in_vain)
    for name in ("build_shared_memory_collective", "stay_on_node"):
        monkeypatch.setattr(meeting, name, lambda: None)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    run: Any = SimpleNamespace(config=SimpleNamespace(hang_timeout=2.0), launch=Launch(1, 2, 0, 2))
    with pytest.raises(RequestError, match=r"not all ranks came to 127\.0\.0\.1:29500, .*: Timed out after 3 seconds"):
        meeting.meet(run)

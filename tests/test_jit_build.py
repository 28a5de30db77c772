from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder.builder import OpBuilder
from processes import free_port

from mst_ds.command_line.entry_point import RequestError
from mst_ds.engine import jit_build


class Builder(OpBuilder):
    """Any operator of DeepSpeed's: they differ in what is compiled only."""

    NAME = "fused_adam"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.name)
        self.folder = folder
        self.loads = 0

    def absolute_name(self) -> str:
        return "deepspeed.ops.test"

    def sources(self) -> list[str]:
        return []

    def is_compatible(self, verbose: bool = False) -> bool:
        return True


def build_as_torch_does(builder: Builder, verbose: bool = True) -> None:
    # It waits for as long as this file is there.
    assert not (builder.folder / "lock").exists(), "this would hang"
    # No other process could build meanwhile.
    with (builder.folder / "mst_ds.lock").open("r+") as another, pytest.raises(BlockingIOError):
        fcntl.flock(another, fcntl.LOCK_EX | fcntl.LOCK_NB)
    builder.loads += 1


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builder:
    monkeypatch.setattr(OpBuilder, "jit_load", build_as_torch_does)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    jit_build.guard_builds()
    jit_build.guard_builds()  # changes nothing more: the lock, taken twice, would not be got
    (tmp_path / "an_operator").mkdir()
    return Builder(tmp_path / "an_operator")


@pytest.mark.parametrize("left_behind", [True, False])
def test_the_lock_of_a_killed_build_does_not_stop_the_next(builder: Builder, left_behind: bool) -> None:
    if left_behind:
        (builder.folder / "lock").touch()
    builder.load(verbose=False)
    assert builder.loads == 1


def test_a_build_says_so_once(builder: Builder, capsys: pytest.CaptureFixture[str]) -> None:
    builder.load(verbose=False)
    assert f"DeepSpeed's {builder.name} is compiled" in capsys.readouterr().out
    (builder.folder / "built.so").touch()
    builder.load(verbose=False)
    assert capsys.readouterr().out == ""


def test_ninja_is_that_of_the_environment(monkeypatch: pytest.MonkeyPatch, builder: Builder) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(builder.folder / "python"))
    with pytest.raises(RequestError, match=r"^ninja, .* is neither on the PATH nor in .*; allowed: pip install ninja$"):
        builder.load(verbose=False)
    (builder.folder / "ninja").touch(mode=0o755)
    builder.load(verbose=False)
    assert os.environ["PATH"] == str(builder.folder)


def test_the_name_of_a_ranks_shared_memory_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()  # so that no run has these names
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    first, second = (
        Path("/dev/shm") / f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_{port}_{rank}" for rank in range(2)
    )
    first.touch()
    second.touch()
    try:
        jit_build.unlink_shared_memory(1)
        jit_build.unlink_shared_memory(1)  # DeepSpeed may have done it
        assert (first.exists(), second.exists()) == (True, False)
    finally:
        first.unlink()
        second.unlink(missing_ok=True)


def test_the_optimizer_on_the_host_is_built_so(monkeypatch: pytest.MonkeyPatch, builder: Builder) -> None:
    folder = builder.folder.with_name("cpu_adam")
    of_optimizer = Builder(folder)

    def build(own: OpBuilder, verbose: bool = True) -> Any:
        assert own.name == of_optimizer.name
        build_as_torch_does(of_optimizer)
        return SimpleNamespace(create_adam=lambda *_: None, destroy_adam=lambda *_: None)

    monkeypatch.setattr(OpBuilder, "jit_load", build)
    jit_build.guard_builds()
    folder.mkdir()
    (folder / "lock").touch()
    DeepSpeedCPUAdam([torch.nn.Parameter(torch.zeros(2))])
    assert of_optimizer.loads == 1


def test_the_collective_of_the_cpu_is_built_so(monkeypatch: pytest.MonkeyPatch, builder: Builder) -> None:
    (builder.folder / "lock").touch()
    accelerator = SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setattr(jit_build, "get_accelerator", lambda: accelerator)
    compatible: dict[str, Any] = {builder.NAME: True}
    monkeypatch.setattr(jit_build.deepspeed.ops, "__compatible_ops__", compatible)
    jit_build.build_shared_memory_collective()
    assert builder.loads == 1


def test_accelerators_have_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(create_op_builder=lambda name: None)
    monkeypatch.setattr(jit_build, "get_accelerator", lambda: accelerator)
    jit_build.build_shared_memory_collective()

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from mst_ds import jit_build


class Builder:
    NAME = "shm_comm"
    name = "shm_comm"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loads = 0

    def load(self, verbose: bool) -> None:
        # What torch does: it waits for as long as this file is there.
        assert not (self.folder / "lock").exists(), "this would hang"
        self.loads += 1


@pytest.mark.parametrize("left_behind", [True, False])
def test_the_lock_of_a_killed_build_does_not_stop_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, left_behind: bool
) -> None:
    if left_behind:
        (tmp_path / "lock").touch()
    builder = Builder(tmp_path)
    accelerator = SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setattr(jit_build, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(jit_build, "_get_build_directory", lambda name, verbose: str(tmp_path))
    monkeypatch.setattr(jit_build.deepspeed.ops, "__compatible_ops__", {"shm_comm": True})
    jit_build.build_shared_memory_collective()
    assert builder.loads == 1


def test_accelerators_have_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(create_op_builder=lambda name: None)
    monkeypatch.setattr(jit_build, "get_accelerator", lambda: accelerator)
    jit_build.build_shared_memory_collective()

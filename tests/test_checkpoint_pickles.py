"""No file of a checkpoint runs code, whoever has written it: what is unpickled holds states and nothing else."""

from __future__ import annotations

import functools
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import Bomb, resumable, rewrite_state, save, step
from deepspeed.runtime.zero.config import ZeroStageEnum
from distributed import run_ranks
from steps import build_engine
from tiers import slow_but_for
from tiny import tiny_llama

from mst_ds.checkpoint import (
    Checkpoint,
    exact_tensors,
    load_checkpoint,
    only_states,
    read_checkpoint,
)
from mst_ds.checkpoint.checksums import checksum
from mst_ds.checkpoint.export import export_checkpoint


def test_exact_tensors_that_are_damaged(tmp_path: Path) -> None:
    """Whose checksum was made to fit."""
    file = tmp_path / "model" / "exact.safetensors"
    file.parent.mkdir()
    file.write_bytes(bytes(50))
    with pytest.raises(OSError, match=r"exact\.safetensors could not be read: .*header") as error:
        exact_tensors(tmp_path)
    assert "\n" not in str(error.value)


def plant(folder: Path, name: str, marker: Path, world_size: int) -> Checkpoint:
    """Hides a bomb in one of a checkpoint's files, and makes everything else fit."""
    file = folder / name
    torch.save({**torch.load(file, weights_only=False), "planted": Bomb(marker)}, file)

    def fit(state: dict[str, Any]) -> None:
        state["sizes"][name], state["checksums"][name] = file.stat().st_size, checksum(file)
        state["world_size"] = world_size

    rewrite_state(folder, fit)
    return read_checkpoint(folder)


def load_what_is_planted(rank: int, folder: Path, stage: int) -> dict[str, list[str]]:
    """What resuming, from one rank and by the universal form, and exporting say, by file."""
    engine = build_engine(tiny_llama(), **resumable(stage))
    step(engine, 1)
    original = save(engine, folder, 1, stage)
    said: dict[str, list[str]] = {}
    for file in sorted(original.rglob("*.pt")):
        name = str(file.relative_to(original))
        said[name] = []
        for world_size in (1, 2):
            copy = Path(shutil.copytree(original, folder / "copies" / name / str(world_size)))
            checkpoint = plant(copy, name, folder / "ran", world_size)
            load = functools.partial(load_checkpoint, engine, seed=0)
            for use in (load, functools.partial(export_checkpoint, folder=copy)):
                try:
                    use(checkpoint=checkpoint)
                except (OSError, ValueError) as error:
                    said[name].append(str(error))
    assert not (folder / "ran").exists()
    return said


@pytest.mark.parametrize("stage", slow_but_for([2], [0, 2, 3]))
def test_a_planted_pickle_runs_no_code(tmp_path: Path, stage: int) -> None:
    (said,) = run_ranks(load_what_is_planted, 1, tmp_path, stage)
    assert len(said) == (2 if stage == 0 else 3)
    for name, lines in said.items():
        refused = [line for line in lines if f"{name} holds exec, which is no state of a run" in line]
        # Neither the universal form nor an export opens random states.
        assert len(refused) == (1 if "random_states" in name else 4), lines


class ByName:
    """Pickled as the attribute of something, as some releases of Python 3.11 pickle the members of an enum."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


def test_a_zero_stage_that_another_python_has_pickled_is_read_and_nothing_else(tmp_path: Path) -> None:
    torch.save({"zero_stage": ByName(ZeroStageEnum, "weights")}, tmp_path / "states.pt")
    with only_states(tmp_path):
        assert torch.load(tmp_path / "states.pt", weights_only=False) == {"zero_stage": ZeroStageEnum.weights}
    for owner, name in ((ZeroStageEnum, "__init__"), (ZeroStageEnum, "mro"), (torch.Tensor, "share_memory_")):
        torch.save(ByName(owner, name), tmp_path / "states.pt")
        with pytest.raises(OSError, match=r"states\.pt holds getattr, which is no state"), only_states(tmp_path):
            torch.load(tmp_path / "states.pt", weights_only=False)


def test_an_environment_that_allows_pickles_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    torch.save(Bomb(tmp_path / "ran"), tmp_path / "states.pt")
    with pytest.raises(OSError, match=r"states\.pt holds exec"), only_states(tmp_path):
        torch.load(tmp_path / "states.pt", weights_only=False)
    assert not (tmp_path / "ran").exists()
    assert dict(os.environ) == before

"""One process, for which it is too late once ranks meet or weights are read; and the one line of a refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import deepspeed
import pytest
import torch.distributed as dist
from processes import ROOT
from refusals import only_line, too_late
from transformers import PreTrainedModel

from mst_ds.commands import train


@pytest.fixture(autouse=True)
def nothing_has_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """One process in the project's folder, for which it is too late once ranks meet or weights are read."""
    monkeypatch.setattr(deepspeed, "init_distributed", too_late("init_distributed"))
    monkeypatch.setattr(dist, "init_process_group", too_late("init_process_group"))
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", too_late("from_pretrained"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command, on one of `world_size` ranks; return its one line, without "mst-train: error: "."""

    def run(*flags: str, world_size: int | str = 1) -> str:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500} if world_size != 1 else {}
        for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world_size, **place}.items():
            monkeypatch.setenv(name, str(value))
        assert train.main(flags) == 2
        output = capsys.readouterr()
        assert output.out == ""
        return only_line(output.err)

    return run

"""What a run sets in its environment before torch and NCCL read it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest

from benchmarks import gpu_session
from mst_ds.commands import train

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
NCCL = "NCCL_LAUNCH_ORDER_IMPLICIT"


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALLOCATOR, NCCL):
        monkeypatch.delenv(name, raising=False)
    # The first import of each that imports torch fails.
    monkeypatch.setitem(sys.modules, "mst_ds.data", None)
    monkeypatch.setitem(sys.modules, "benchmarks.gpu.session", None)
    monkeypatch.setattr(sys, "path", [*sys.path])


def begin(command: Callable[[], object] = lambda: train.main([])) -> dict[str, str]:
    with pytest.raises(ImportError):
        command()
    return {name: os.environ[name] for name in (*ALLOCATOR, NCCL) if name in os.environ}


# What is measured on a GPU is measured as a run is.
@pytest.mark.parametrize("command", [lambda: train.main([]), gpu_session.main], ids=["run", "session"])
def test_torch_and_nccl_are_told_before_they_are_imported(command: Callable[[], object]) -> None:
    assert begin(command) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True", NCCL: "1"}


@pytest.mark.parametrize("command", [lambda: train.main([]), gpu_session.main], ids=["run", "session"])
@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_user_has_set_stays(name: str, command: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: "garbage_collection_threshold:0.8", NCCL: "0"}
    for key, value in chosen.items():
        monkeypatch.setenv(key, value)
    assert begin(command) == chosen

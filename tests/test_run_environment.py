"""What a run sets in its environment before torch and NCCL read it."""

from __future__ import annotations

import os
import sys

import pytest

from mst_ds.commands import train

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
NCCL = "NCCL_LAUNCH_ORDER_IMPLICIT"


@pytest.fixture(autouse=True)
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*ALLOCATOR, NCCL):
        monkeypatch.delenv(name, raising=False)
    # The first import of a run that imports torch fails.
    monkeypatch.setitem(sys.modules, "mst_ds.data", None)


def begin() -> dict[str, str]:
    with pytest.raises(ImportError):
        train.main([])
    return {name: os.environ[name] for name in (*ALLOCATOR, NCCL) if name in os.environ}


def test_torch_and_nccl_are_told_before_they_are_imported() -> None:
    assert begin() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True", NCCL: "1"}


@pytest.mark.parametrize("name", ALLOCATOR)
def test_what_the_user_has_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {name: "garbage_collection_threshold:0.8", NCCL: "0"}
    for key, value in chosen.items():
        monkeypatch.setenv(key, value)
    assert begin() == chosen

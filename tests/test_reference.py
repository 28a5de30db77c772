"""What a run takes of the log-probabilities of a reference that are in its folder, and what it computes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Sequence, Value

from mst_ds.checkpoint import Identity
from mst_ds.config import TrainConfig
from mst_ds.data import PackedDataset
from mst_ds.training import reference
from mst_ds.training.reference import reference_logps


def logps(monkeypatch: pytest.MonkeyPatch, file: Path, value: float, *, max_steps: int = 1, goes_on: bool) -> list[int]:
    """Of a run with a pair a step, three in all, under a reference that gives this value: which pairs have it."""
    features = Features({"input_ids": Sequence(Value("int32")), "learned": Sequence(Value("bool"))})
    tokens = Dataset.from_dict({"input_ids": [[1, 2]] * 6, "learned": [[True] * 2] * 6}, features=features)
    train = PackedDataset(tokens, 2, 0, packing="none", too_long="truncate", group=2)

    def computed(engine: Any, run: Any, dataset: PackedDataset, group: Any, number: int) -> torch.Tensor:
        found = torch.full((number,), torch.nan, dtype=torch.float64)
        for index in range(len(dataset)):
            found[dataset.documents_in(index)] = value
        return found

    monkeypatch.setattr(reference, "_logps", computed)
    monkeypatch.setattr(reference.dist, "broadcast", lambda tensor, source: None)
    run: Any = SimpleNamespace(
        launch=SimpleNamespace(rank=0),
        config=TrainConfig(objective="dpo", max_steps=max_steps),
        identity=Identity({}, None, "", "fp32", 3, {}),
        plan=SimpleNamespace(samples_per_step=1),
        checkpoint=object() if goes_on else None,
        steps_done=0,
    )
    data: Any = SimpleNamespace(train=train, held_out=None, num_documents=6, fingerprint="a")
    found = reference_logps(SimpleNamespace(device=torch.device("cpu")), run, data, None, file)  # type: ignore[arg-type]
    return [pair for pair, each in enumerate(found[0::2].tolist()) if each == value]


def test_only_a_run_that_goes_on_takes_what_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder of a model may have other weights than when another run wrote the file."""
    file = tmp_path / "reference.safetensors"
    first = logps(monkeypatch, file, -1.0, goes_on=False)
    assert len(first) == 1
    assert logps(monkeypatch, file, -2.0, goes_on=True) == []
    assert logps(monkeypatch, file, -3.0, goes_on=False) == first
    # With more steps those of more samples.
    assert logps(monkeypatch, file, -4.0, max_steps=3, goes_on=True) == [pair for pair in range(3) if pair not in first]


def test_a_damaged_file_is_computed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "reference.safetensors"
    file.write_bytes(b"no tensors")
    assert len(logps(monkeypatch, file, -1.0, goes_on=True)) == 1
    assert logps(monkeypatch, file, -2.0, goes_on=True) == []

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest

from mst_ds.data import PackedDataset


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test reads and writes a cache of its own."""
    cache = tmp_path / "datasets_cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    return cache


@pytest.fixture
def token_rows() -> Callable[..., datasets.Dataset]:
    """Documents of the given lengths; the token ids count up from 0, so that each token is another."""

    def build(*lengths: int) -> datasets.Dataset:
        ends = np.cumsum(lengths)
        rows = [list(range(end - length, end)) for length, end in zip(lengths, ends.tolist(), strict=True)]
        features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
        return datasets.Dataset.from_dict({"input_ids": rows}, features=features)

    return build


@pytest.fixture
def packed(token_rows: Callable[..., datasets.Dataset]) -> Callable[..., PackedDataset]:
    """`num_samples` samples of `seq_len` tokens, the last of them one token short."""

    def build(num_samples: int, seq_len: int = 5) -> PackedDataset:
        return PackedDataset(token_rows(3, num_samples * seq_len - 4), seq_len, pad_id=10_000)

    return build

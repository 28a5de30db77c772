from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from filelock import FileLock, Timeout

from mst_ds.config import TrainConfig
from mst_ds.data import (
    IGNORE_INDEX,
    PackedDataset,
    byte_tokenizer,
    load_documents,
    packing,
    split_documents,
    tokenise,
)

EOS = 256
TokenRows = Callable[..., Dataset]


def real_tokens(dataset: PackedDataset) -> list[int]:
    """The tokens of all samples in order, padding left out."""
    samples = [dataset[index] for index in range(len(dataset))]
    return [token for sample in samples for token in sample["labels"].tolist() if token != IGNORE_INDEX]


def test_documents_are_tokenised_and_end_with_eos() -> None:
    tokens = tokenise(Dataset.from_dict({"text": ["ab", "é"]}), byte_tokenizer())

    assert tokens.column_names == ["input_ids"]
    assert list(tokens["input_ids"]) == [[97, 98, EOS], [0xC3, 0xA9, EOS]]
    assert tokens.features["input_ids"].feature.dtype == "int32"


def test_rows_without_text_give_no_tokens() -> None:
    none = tokenise(Dataset.from_dict({"text": ["", None]}), byte_tokenizer())
    some = tokenise(Dataset.from_dict({"text": ["", None, "a"]}), byte_tokenizer())

    assert list(some["input_ids"]) == [[97, EOS]]
    with pytest.raises(ValueError, match=r"^seq_len is 4, but the dataset has 0 tokens, .*\Z"):
        PackedDataset(none, 4, EOS)


def test_tokens_are_cached_by_text_and_by_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a text")
    calls = []
    encode = packing._encode

    def counted(rows: dict[str, list[str | None]], tokenizer: object) -> object:
        calls.append(rows)
        return encode(rows, tokenizer)

    # The same function in the eyes of the cache, which knows a function by its name.
    counted.__module__, counted.__qualname__ = encode.__module__, encode.__qualname__
    monkeypatch.setattr(packing, "_encode", counted)

    def run(tokenizer: object) -> Dataset:
        return tokenise(load_documents(TrainConfig(dataset=str(tmp_path / "a.txt"))), tokenizer)

    first = run(byte_tokenizer())
    assert len(calls) == 1
    assert list(run(byte_tokenizer())["input_ids"]) == list(first["input_ids"])
    assert len(calls) == 1

    other = byte_tokenizer()
    other.add_tokens(["text"])
    assert list(run(other)["input_ids"]) == [[97, 32, 257, EOS]]
    (tmp_path / "a.txt").write_text("another text")
    assert len(run(byte_tokenizer())["input_ids"][0]) == 13
    assert len(calls) == 3


def test_other_ranks_wait_for_the_one_that_tokenises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a text")
    documents = load_documents(TrainConfig(dataset=str(tmp_path / "a.txt")))
    lock = Path(documents.cache_files[0]["filename"]).with_name("tokenise.lock")
    encode = packing._encode

    def encode_beside_another_rank(rows: dict[str, list[str | None]], tokenizer: object) -> object:
        with pytest.raises(Timeout):
            FileLock(lock).acquire(timeout=0)
        return encode(rows, tokenizer)

    monkeypatch.setattr(packing, "_encode", encode_beside_another_rank)

    tokenise(documents, byte_tokenizer())

    FileLock(lock).acquire(timeout=0).lock.release()


@pytest.mark.parametrize("seq_len", [1, 4, 7, 15, 16, 507])
def test_every_token_is_in_exactly_one_sample_in_document_order(token_rows: TokenRows, seq_len: int) -> None:
    tokens = token_rows(1, 300, 2, 1, 1021, 5)
    dataset = PackedDataset(tokens, seq_len, pad_id=9999)

    assert len(dataset) == -(-1330 // seq_len)
    assert real_tokens(dataset) == list(range(1330))
    for sample in (dataset[index] for index in range(len(dataset))):
        assert sample["input_ids"].shape == sample["labels"].shape == (seq_len,)
        assert sample["input_ids"].dtype == sample["labels"].dtype == torch.int64


def test_tail_is_padded_and_its_padding_ignored(token_rows: TokenRows) -> None:
    dataset = PackedDataset(token_rows(3, 4), 5, pad_id=EOS)

    assert dataset[1]["input_ids"].tolist() == [5, 6, EOS, EOS, EOS]
    assert dataset[1]["labels"].tolist() == [5, 6, IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX]


def test_samples_of_chosen_documents_hold_their_tokens_only(token_rows: TokenRows) -> None:
    tokens = token_rows(3, 4, 2, 6)

    assert real_tokens(PackedDataset(tokens, 4, 0, np.array([0, 2, 3]))) == [0, 1, 2, *range(7, 15)]
    assert real_tokens(PackedDataset(tokens, 4, 0, np.array([1, 3]), max_samples=1)) == [3, 4, 5, 6]


def test_samples_stop_at_the_end(token_rows: TokenRows) -> None:
    dataset = PackedDataset(token_rows(8), 4, 0)

    assert len(list(dataset)) == 2
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"sample {index} of 2"):
            dataset[index]


def test_samples_are_read_from_the_file_as_they_are_asked_for(tmp_path: Path) -> None:
    text = "x" * 2**19
    (tmp_path / "a.txt").write_text(text)
    tokens = tokenise(load_documents(TrainConfig(dataset=str(tmp_path / "a.txt"))), byte_tokenizer())
    pool = pa.default_memory_pool()
    metered = pa.proxy_memory_pool(pool)

    pa.set_memory_pool(metered)
    try:
        dataset = PackedDataset(tokens, 1024, EOS)
        samples = [dataset[index] for index in (0, 300, len(dataset) - 1)]
    finally:
        pa.set_memory_pool(pool)

    # The document has 2 MiB of ids; a sample has 4 KiB of them.
    assert metered.max_memory() < 2**16
    assert samples[-1]["input_ids"][0] == EOS
    assert samples[1]["input_ids"].tolist() == [ord("x")] * 1024


def test_fewer_tokens_than_one_sequence_is_refused(token_rows: TokenRows) -> None:
    assert len(PackedDataset(token_rows(3, 4), 7, 0)) == 1
    with pytest.raises(ValueError, match=r"^seq_len is 8, but the dataset has 7 tokens, .* up to 7.*\Z"):
        PackedDataset(token_rows(3, 4), 8, 0)


def test_split_parts_whole_documents(token_rows: TokenRows) -> None:
    lengths = [5, 17, 3, 40, 8, 21, 9, 30]
    tokens = token_rows(*lengths)

    train, held_out = split_documents(tokens, num_samples=3, seq_len=10, seed=1)

    assert sorted([*train, *held_out]) == list(range(8))
    assert sum(lengths[document] for document in held_out) >= 30
    seen = real_tokens(PackedDataset(tokens, 10, 0, train))
    unseen = real_tokens(PackedDataset(tokens, 10, 0, held_out))
    assert sorted(seen + unseen) == list(range(sum(lengths)))


def test_split_takes_no_more_documents_than_needed(token_rows: TokenRows) -> None:
    for num_samples in range(1, 10):
        assert len(split_documents(token_rows(*[10] * 10), num_samples, 10, seed=3)[1]) == num_samples


def test_split_is_the_same_for_a_seed_and_another_for_another(token_rows: TokenRows) -> None:
    tokens = token_rows(*[10] * 100)
    parts = {seed: split_documents(tokens, 5, 10, seed)[1].tolist() for seed in (1, 2)}

    assert split_documents(tokens, 5, 10, 1)[1].tolist() == parts[1]
    assert parts[1] != parts[2]


def test_split_of_nothing_leaves_all_for_training(token_rows: TokenRows) -> None:
    train, held_out = split_documents(token_rows(5, 5), 0, 4, seed=1)

    assert train.tolist() == [0, 1]
    assert held_out.tolist() == []


@pytest.mark.parametrize(("lengths", "num_samples"), [((50,), 1), ((5, 5), 2), ((5, 5), 100)])
def test_split_that_leaves_nothing_for_training_is_refused(
    token_rows: TokenRows, lengths: tuple[int, ...], num_samples: int
) -> None:
    with pytest.raises(ValueError, match=r"^eval_samples is .* leaves none for training; allowed: .*\Z"):
        split_documents(token_rows(*lengths), num_samples, 4, seed=1)

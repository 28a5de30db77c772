from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from filelock import FileLock, Timeout

from mst_ds.config import Packing, TrainConfig
from mst_ds.data import (
    IGNORE_INDEX,
    PackedDataset,
    byte_tokenizer,
    load_documents,
    shard,
    split_documents,
    tokenise,
)
from mst_ds.data.long_texts import Text
from mst_ds.data.text_encoder import TextEncoder
from mst_ds.topology import Topology

EOS = 256
PAD = 9999
PACKINGS = get_args(Packing)
TokenRows = Callable[..., Dataset]
either_packing = pytest.mark.parametrize("how", PACKINGS)


def real_tokens(dataset: PackedDataset) -> list[int]:
    """The tokens of all samples in order, padding left out."""
    samples = [dataset[index] for index in range(len(dataset))]
    return [token for sample in samples for token in sample["input_ids"][sample["attention_mask"] == 1].tolist()]


def documents_in_samples(lengths: list[int], seq_len: int, how: Packing) -> list[list[list[int]]]:
    """For each sample its documents, or what it has of them: counted out token by token, ids as in `token_rows`.

    A sample of a single token is not one.
    """
    ends = list(accumulate(lengths))
    documents = [list(range(end - length, end)) for end, length in zip(ends, lengths, strict=True) if length]
    if how == "none":
        return [
            [document[start : start + seq_len]]
            for document in documents
            for start in range(0, len(document), seq_len)
            if len(document) - start > 1
        ]
    stream = [(number, token) for number, document in enumerate(documents) for token in document]
    samples = [stream[start : start + seq_len] for start in range(0, len(stream), seq_len) if len(stream) - start > 1]
    return [[[token for _, token in part] for _, part in groupby(sample, lambda pair: pair[0])] for sample in samples]


def padded(documents: list[list[int]], seq_len: int) -> dict[str, list[int]]:
    """The sample that holds these documents."""
    ids = [token for document in documents for token in document]
    padding = seq_len - len(ids)
    return {
        "input_ids": ids + [PAD] * padding,
        "labels": [label for document in documents for label in (IGNORE_INDEX, *document[1:])]
        + [IGNORE_INDEX] * padding,
        "position_ids": [position for document in documents for position in range(len(document))] + [*range(padding)],
        "attention_mask": [1] * len(ids) + [0] * padding,
    }


def test_documents_are_tokenised_and_end_with_eos() -> None:
    tokens = tokenise(Dataset.from_dict({"text": ["ab", "é"]}), byte_tokenizer())

    assert tokens.column_names == ["input_ids"]
    assert list(tokens["input_ids"]) == [[97, 98, EOS], [0xC3, 0xA9, EOS]]
    assert tokens.features["input_ids"].feature.dtype == "int32"


def test_rows_without_text_give_no_tokens() -> None:
    none = tokenise(Dataset.from_dict({"text": ["", None]}), byte_tokenizer())
    some = tokenise(Dataset.from_dict({"text": ["", None, "a"]}), byte_tokenizer())

    assert list(some["input_ids"]) == [[97, EOS]]
    for how in PACKINGS:
        with pytest.raises(ValueError, match=r"^the dataset has 0 tokens in 0 document\(s\), .*; allowed: .*\Z"):
            PackedDataset(none, 4, EOS, packing=how)


def test_tokens_are_cached_by_text_and_by_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a text")
    calls = []
    encode = TextEncoder.encode

    def counted(encoder: TextEncoder, texts: Iterable[Text]) -> tuple[array[int], list[int]]:
        calls.append(encoder)
        return encode(encoder, texts)

    monkeypatch.setattr(TextEncoder, "encode", counted)

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
    encode, seen = TextEncoder.encode, []

    def encode_beside_another_rank(encoder: TextEncoder, texts: Iterable[Text]) -> tuple[array[int], list[int]]:
        with pytest.raises(Timeout) as refusal:
            FileLock(lock).acquire(timeout=0)
        seen.append(refusal)
        return encode(encoder, texts)

    monkeypatch.setattr(TextEncoder, "encode", encode_beside_another_rank)

    tokenise(documents, byte_tokenizer())

    assert len(seen) == 1
    FileLock(lock).acquire(timeout=0).lock.release()


def test_what_reading_took_does_not_lie_beside_the_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow keeps up to three times a text for later."""
    size = 2**25
    Dataset.from_dict({"text": [np.random.default_rng(0).bytes(size // 2).hex()]}).to_parquet(tmp_path / "a.parquet")
    seen: list[int] = []

    def anonymous_bytes() -> int:
        memory = psutil.Process().memory_info()
        return memory.rss - memory.shared

    def encode(encoder: TextEncoder, texts: Iterable[Text]) -> tuple[array[int], list[int]]:
        seen.append(anonymous_bytes())
        raise ValueError("far enough")

    monkeypatch.setattr(TextEncoder, "encode", encode)
    documents = load_documents(TrainConfig(dataset=str(tmp_path / "a.parquet")))
    after_reading = anonymous_bytes()
    with pytest.raises(ValueError, match="far enough"):
        tokenise(documents, byte_tokenizer())
    assert seen[0] < after_reading - size


@either_packing
@pytest.mark.parametrize("seq_len", [2, 3, 4, 7, 15, 16, 507, 1330])
def test_every_token_is_in_exactly_one_sample_in_document_order(
    token_rows: TokenRows, seq_len: int, how: Packing
) -> None:
    lengths = [1, 300, 2, 1, 1021, 5]
    dataset = PackedDataset(token_rows(*lengths), seq_len, PAD, packing=how)

    ends = [1330] if how == "documents" else list(accumulate(lengths))
    alone = {end - 1 for start, end in pairwise([0, *ends]) if (end - start) % seq_len == 1}
    assert real_tokens(dataset) == [token for token in range(1330) if token not in alone]
    for sample in (dataset[index] for index in range(len(dataset))):
        assert {(tensor.shape, tensor.dtype) for tensor in sample.values()} == {((seq_len,), torch.int64)}
        assert (sample["position_ids"] < seq_len).all()


@either_packing
@pytest.mark.parametrize("seq_len", [3, 8, 10, 19, 64])
@pytest.mark.parametrize("lengths", [[64], [8, 8, 48], [1, 9, 1, 1, 20, 32], [0, 0, 30, 0, 34, 0], [2] * 32])
def test_a_sample_is_its_documents_one_after_the_other(
    token_rows: TokenRows, lengths: list[int], seq_len: int, how: Packing
) -> None:
    dataset = PackedDataset(token_rows(*lengths), seq_len, PAD, packing=how)

    samples = [{name: column.tolist() for name, column in dataset[index].items()} for index in range(len(dataset))]

    assert samples == [padded(documents, seq_len) for documents in documents_in_samples(lengths, seq_len, how)]


def test_a_packed_sample_by_hand(token_rows: TokenRows) -> None:
    dataset = PackedDataset(token_rows(3, 6, 3), 5, PAD)

    # Of tokens 3 to 8, a document, the first sample has two; the second begins anew with the other four.
    assert dataset[0]["position_ids"].tolist() == [0, 1, 2, 0, 1]
    assert dataset[0]["labels"].tolist() == [IGNORE_INDEX, 1, 2, IGNORE_INDEX, 4]
    assert dataset[1]["position_ids"].tolist() == [0, 1, 2, 3, 0]
    assert dataset[1]["labels"].tolist() == [IGNORE_INDEX, 6, 7, 8, IGNORE_INDEX]
    assert dataset[2]["input_ids"].tolist() == [10, 11, PAD, PAD, PAD]
    assert dataset[2]["attention_mask"].tolist() == [1, 1, 0, 0, 0]
    assert dataset[2]["position_ids"].tolist() == [0, 1, 0, 1, 2]


@either_packing
def test_every_sample_has_a_label(token_rows: TokenRows, how: Packing) -> None:
    # Four documents of a sequence and EOS, and one that is EOS alone; together 21 tokens, also one too many.
    dataset = PackedDataset(token_rows(*[5] * 4, 1), 4, PAD, packing=how)

    assert len(dataset) == (5 if how == "documents" else 4)
    assert all((dataset[index]["labels"] != IGNORE_INDEX).any() for index in range(len(dataset)))


@either_packing
@pytest.mark.parametrize("sp_size", [1, 2, 3])
def test_each_token_of_a_document_but_its_first_is_a_label_once(
    token_rows: TokenRows, sp_size: int, how: Packing
) -> None:
    # Three samples of whole documents. Of 20 tokens a shard has 10 or 7, so borders lie within shards and across.
    lengths = [10, 1, 9, 7, 2, 11, 3, 13]
    dataset = PackedDataset(token_rows(*lengths), 20, PAD, packing=how)
    pairs = []
    for sample in (dataset[index] for index in range(len(dataset))):
        batch = {name: column[None] for name, column in sample.items()}
        for rank in range(sp_size):
            part = shard(batch, Topology(rank, sp_size, sp_size), PAD)
            is_valid = part["shift_labels"] != IGNORE_INDEX
            assert (part["attention_mask"][is_valid] == 1).all()
            pairs += zip(part["input_ids"][is_valid].tolist(), part["shift_labels"][is_valid].tolist(), strict=True)

    firsts = {0, *accumulate(lengths)}
    assert pairs == [(token - 1, token) for token in range(sum(lengths)) if token not in firsts]
    assert len(pairs) == sum(length - 1 for length in lengths)


@either_packing
def test_end_of_text_is_learned_and_predicts_nothing(how: Packing) -> None:
    tokens = tokenise(Dataset.from_dict({"text": ["ab", "cde"]}), byte_tokenizer())
    dataset = PackedDataset(tokens, 7, EOS, packing=how)

    labels = [label for index in range(len(dataset)) for label in dataset[index]["labels"].tolist()]

    # EOS is the padding's id too, which is no label.
    assert [label for label in labels if label != IGNORE_INDEX] == [98, EOS, 100, 101, EOS]


def test_documents_of_one_token_alone_are_refused(token_rows: TokenRows) -> None:
    for how in PACKINGS:
        with pytest.raises(ValueError, match=r"^the dataset has 9 tokens in 9 document\(s\), .*; allowed: .*\Z"):
            PackedDataset(token_rows(*[1] * 9), 4, PAD, packing=how)


def test_samples_of_chosen_documents_hold_their_tokens_only(token_rows: TokenRows) -> None:
    tokens = token_rows(3, 4, 2, 6)

    assert real_tokens(PackedDataset(tokens, 4, 0, np.array([0, 2, 3]))) == [0, 1, 2, *range(7, 15)]
    assert real_tokens(PackedDataset(tokens, 4, 0, np.array([1, 3]), max_samples=1)) == [3, 4, 5, 6]
    alone = PackedDataset(tokens, 4, 0, np.array([0, 3]), max_samples=2, packing="none")
    assert [alone[index]["input_ids"].tolist() for index in range(len(alone))] == [[0, 1, 2, 0], [9, 10, 11, 12]]


@either_packing
def test_samples_stop_at_the_end(token_rows: TokenRows, how: Packing) -> None:
    dataset = PackedDataset(token_rows(8), 4, 0, packing=how)

    assert len(list(dataset)) == 2
    for index in (2, -1):
        with pytest.raises(IndexError, match=f"sample {index} of 2"):
            dataset[index]


@either_packing
def test_samples_are_read_from_the_file_as_they_are_asked_for(tmp_path: Path, how: Packing) -> None:
    text = "x" * (2**19 + 1)
    (tmp_path / "a.txt").write_text(text)
    tokens = tokenise(load_documents(TrainConfig(dataset=str(tmp_path / "a.txt"))), byte_tokenizer())
    pool = pa.default_memory_pool()
    metered = pa.proxy_memory_pool(pool)

    pa.set_memory_pool(metered)
    try:
        dataset = PackedDataset(tokens, 1024, EOS, packing=how)
        samples = [dataset[index] for index in (0, 300, len(dataset) - 1)]
    finally:
        pa.set_memory_pool(pool)

    # The document has 2 MiB of ids; a sample has 4 KiB of them.
    assert metered.max_memory() < 2**16
    assert samples[-1]["input_ids"][:2].tolist() == [ord("x"), EOS]
    assert samples[1]["input_ids"].tolist() == [ord("x")] * 1024


def test_fewer_tokens_than_one_sequence_is_refused(token_rows: TokenRows) -> None:
    assert len(PackedDataset(token_rows(3, 4), 7, 0)) == 1
    with pytest.raises(ValueError, match=r"^seq_len is 8, but the dataset has 7 tokens, .* up to 7.*\Z"):
        PackedDataset(token_rows(3, 4), 8, 0)
    assert len(PackedDataset(token_rows(3, 4), 8, 0, packing="none")) == 2


@either_packing
@pytest.mark.parametrize("num_samples", [1, 3, 5])
def test_split_parts_whole_documents(token_rows: TokenRows, num_samples: int, how: Packing) -> None:
    lengths = [6, 18, 4, 40, 8, 22, 12, 30]  # even, so that no token is left over alone
    tokens = token_rows(*lengths)

    train, held_out = split_documents(tokens, num_samples, seq_len=10, seed=1, packing=how)

    assert sorted([*train, *held_out]) == list(range(8))
    unseen = PackedDataset(tokens, 10, 0, held_out, packing=how)
    full = sum(bool(unseen[index]["attention_mask"].all()) for index in range(len(unseen)))
    assert (full if how == "documents" else len(unseen)) >= num_samples
    seen = real_tokens(PackedDataset(tokens, 10, 0, train, packing=how))
    assert sorted(seen + real_tokens(unseen)) == list(range(sum(lengths)))


def test_split_takes_no_more_documents_than_needed(token_rows: TokenRows) -> None:
    tokens, longer = token_rows(*[10] * 10), token_rows(*[12] * 10)
    for num_samples in range(1, 10):
        assert len(split_documents(tokens, num_samples, 10, seed=3)[1]) == num_samples
        # One sample a document, however short; two a document that is too long.
        assert len(split_documents(tokens, num_samples, 50, 3, "none")[1]) == num_samples
        assert len(split_documents(longer, num_samples, 10, 3, "none")[1]) == -(-num_samples // 2)


def test_split_is_the_same_for_a_seed_and_another_for_another(token_rows: TokenRows) -> None:
    tokens = token_rows(*[10] * 100)
    parts = {seed: split_documents(tokens, 5, 10, seed)[1].tolist() for seed in (1, 2)}

    assert split_documents(tokens, 5, 10, 1)[1].tolist() == parts[1]
    assert parts[1] != parts[2]


def test_split_of_nothing_leaves_all_for_training(token_rows: TokenRows) -> None:
    train, held_out = split_documents(token_rows(5, 5), 0, 4, seed=1)

    assert train.tolist() == [0, 1]
    assert held_out.tolist() == []


@pytest.mark.parametrize(
    ("lengths", "num_samples", "how", "says"),
    [
        ((50,), 1, "documents", "has 50 token(s) in 1 document, and holding whole ones out leaves 0 token(s)"),
        ((5, 5), 2, "documents", "has 10 token(s) in 2 documents, and holding whole ones out leaves 0 token(s)"),
        ((5, 5), 100, "documents", "leaves 0 token(s)"),
        ((3, 3), 1, "documents", "has 6 token(s) in 2 documents, and holding whole ones out leaves 0 token(s)"),
        (
            (3, 4, 3),
            1,
            "documents",
            "has 10 token(s) in 3 documents, and holding whole ones out leaves 3 token(s)",
        ),
        ((50,), 1, "none", "has 13 sample(s) in 1 document, and holding whole ones out leaves 0 sample(s)"),
        ((3, 3), 2, "none", "has 2 sample(s) in 2 documents, and holding whole ones out leaves 0 sample(s)"),
        ((5, 5), 100, "none", "leaves 0 sample(s)"),
        ((4, 1, 1), 1, "none", "has 1 sample(s) in 3 documents, and holding whole ones out leaves 0 sample(s)"),
    ],
)
def test_split_that_leaves_too_little_for_training_is_refused(
    token_rows: TokenRows, lengths: tuple[int, ...], num_samples: int, how: Packing, says: str
) -> None:
    with pytest.raises(ValueError, match=rf"^eval_samples is {num_samples} of 4 tokens, .*; allowed: .*\Z") as caught:
        split_documents(token_rows(*lengths), num_samples, 4, seed=0, packing=how)
    assert says in str(caught.value)


@pytest.mark.parametrize(("lengths", "how"), [((4, 4), "documents"), ((2, 2), "none")])
def test_split_that_leaves_one_sample_for_training_is_enough(
    token_rows: TokenRows, lengths: tuple[int, ...], how: Packing
) -> None:
    assert [len(part) for part in split_documents(token_rows(*lengths), 1, 4, seed=1, packing=how)] == [1, 1]

"""Several datasets as one: shares of documents, chosen alike by every rank; what cannot be mixed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_tokenizers import chat_tokenizer

from mst_ds.config import TrainConfig
from mst_ds.data import byte_tokenizer, load_training_data, text_source
from mst_ds.data.mixing import mix
from mst_ds.dataset_files import look_at_datasets
from mst_ds.rows.sources import sources_of


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Files in the current folder: 8 documents of 10 letters "a", and 30 of 20 letters "b"."""
    monkeypatch.chdir(tmp_path)
    for letter, number, length in (("a", 8, 10), ("b", 30, 20)):
        rows = [json.dumps({"text": letter * length}) + "\n"] * number
        Path(f"{letter}.jsonl").write_text("".join(rows), encoding="utf-8")
    return "a.jsonl", "b.jsonl"


def letters(*names: str, seed: int = 1, **flags: Any) -> tuple[int, int, str | None]:
    """Of "a" and of "b" how many are trained on; and the line about it."""
    config = TrainConfig(dataset=list(names), seq_len=30, packing="none", seed=seed, **flags)
    data = load_training_data(config, byte_tokenizer())
    ids = [token for sample in data.train for token in sample["input_ids"].tolist()]
    return ids.count(ord("a")), ids.count(ord("b")), data.mixture


def test_shares_are_of_documents_and_none_is_taken_twice(two: tuple[str, str]) -> None:
    line = "data: 8 of 8 documents of 'a.jsonl' with 88 tokens; 24 of 30 documents of 'b.jsonl' with 504 tokens"
    assert letters("a.jsonl:0.25", "b.jsonl:0.75") == (80, 24 * 20, line)
    assert letters("b.jsonl:0.9", "a.jsonl:0.1")[:2] == (3 * 10, 30 * 20)


def test_without_weights_all_is_taken(two: tuple[str, str]) -> None:
    line = "data: 8 of 8 documents of 'a.jsonl' with 88 tokens; 30 of 30 documents of 'b.jsonl' with 630 tokens"
    assert letters(*two) == (80, 600, line)
    assert letters("a.jsonl:1") == letters("a.jsonl") == (80, 0, None)


def test_the_seed_alone_says_which_documents(token_rows: Callable[..., datasets.Dataset]) -> None:
    def rows(seed: int) -> tuple[list[int], list[int]]:
        found = mix(["a", "b"], [token_rows(*[2] * 90), token_rows(*[3] * 90)], [0.1, 0.9], seed).rows.tolist()
        return [row for row in found if row < 90], [row - 90 for row in found if row >= 90]

    first, second = rows(1)
    assert (len(first), second) == (10, list(range(90)))
    assert first == sorted(set(first))
    assert rows(1)[0] == first
    assert rows(2)[0] != first
    assert first != list(range(10))


def test_what_is_not_taken_is_neither_counted_nor_held_out(two: tuple[str, str]) -> None:
    config = TrainConfig(dataset=["a.jsonl:0.5", "b.jsonl:0.5"], seq_len=15, too_long="drop", eval_steps=1)
    data = load_training_data(config.changed(eval_samples=2, packing="none"), byte_tokenizer())
    assert data.note == "data: of 16 documents 8 are longer than 15 tokens and left out"
    assert data.held_out is not None
    assert (data.train.num_documents, data.held_out.num_documents) == (6, 2)


def test_a_name_with_a_colon_is_a_file_where_there_is_one(two: tuple[str, str]) -> None:
    Path("a.jsonl").rename("a:0.5")
    names = [(source.name, source.weight) for source in sources_of(TrainConfig(dataset=["a:0.5:0.25", "b:x.csv:.75"]))]
    assert names == [("a:0.5", 0.25), ("b:x.csv", 0.75)]
    assert [source.name for source in sources_of(TrainConfig(dataset=["a:0.5", "b:x"]))] == ["a:0.5", "b:x"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["a:0.7", "b:0.2"], "the weights of the datasets make 0.9; allowed: a weight with each"),
        (["a:0.7"], "the weights of the datasets make 0.7"),
        (["a:0.7", "b"], "dataset 'b' has no weight, but another has; allowed: a weight with each dataset"),
        (["a:1.5", "b:-0.5"], "dataset 'a' has the weight 1.5; allowed"),
        (["a:1", "b:0"], "dataset 'b' has the weight 0; allowed"),
        (["a:nan", "b:0.5"], "dataset 'a' has the weight nan; allowed"),
    ],
)
def test_wrong_weights_are_refused(names: list[str], says: str) -> None:
    with pytest.raises(ValueError, match="allowed: ") as caught:
        sources_of(TrainConfig(dataset=names))
    assert says in str(caught.value)


def test_chats_prompts_and_ids_mix_with_each_other_and_not_with_texts(
    two: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    Path("chats.jsonl").write_text(json.dumps({"messages": chat}), encoding="utf-8")
    Path("prompts.csv").write_text("prompt,completion\nx, y\n", encoding="utf-8")
    datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[-100, 2]]}).to_parquet("ids.parquet")
    names = ["chats.jsonl", "prompts.csv", "ids.parquet"]
    data = load_training_data(TrainConfig(dataset=names, seq_len=99), chat_tokenizer("llama3"))
    assert data.train.num_documents == 3
    assert (data.train[0]["labels"] >= 0).sum() == 2 + 2 + 1

    with pytest.raises(ValueError, match=r"dataset 'a.jsonl' has texts, and 'chats.jsonl' rows of which a part"):
        look_at_datasets(TrainConfig(dataset=["a.jsonl", "chats.jsonl"]))

    # The rows of the hub are known only when they are there.
    monkeypatch.setattr(
        text_source, "load_dataset", lambda *args, **kwargs: datasets.Dataset.from_dict({"text": ["x"]})
    )
    with pytest.raises(ValueError, match=r"dataset 'owner/name' has texts, and 'chats.jsonl' rows of which a part"):
        load_training_data(TrainConfig(dataset=["chats.jsonl", "owner/name"]), chat_tokenizer("llama3"))

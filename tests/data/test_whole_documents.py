"""Documents of which only a part is learned, in samples: whole, truncated, left out or split."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from chat_tokenizers import chat_tokenizer
from datasets import Dataset, Features, Sequence, Value
from plain_model import assert_close, loss_and_gradients
from steps import patched_step
from tiny import tiny_llama

from mst_ds.config import IGNORE_INDEX, Packing, TooLong, TrainConfig
from mst_ds.data import PackedDataset, ShardedLoader, byte_tokenizer, describe, load_training_data, shard
from mst_ds.data.bins import first_fit_decreasing
from mst_ds.data.fitting import fitting_documents
from mst_ds.topology import Topology

PAD = 9999
Document = tuple[list[int], list[bool]]


def rows(*learned: str) -> tuple[Dataset, list[Document]]:
    """A document for each text, in which "x" is a token that is learned; the ids count up over all."""
    ends = np.cumsum([len(each) for each in learned]).tolist()
    ids = [list(range(end - len(each), end)) for each, end in zip(learned, ends, strict=True)]
    flags = [[letter == "x" for letter in each] for each in learned]
    features = Features({"input_ids": Sequence(Value("int32")), "learned": Sequence(Value("bool"))})
    return Dataset.from_dict({"input_ids": ids, "learned": flags}, features=features), list(
        zip(ids, flags, strict=True)
    )


def documents_of(sample: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """The ids and labels of each document of a sample, parted where positions begin again."""
    real = sample["attention_mask"] == 1
    assert sample["attention_mask"].tolist() == sorted(sample["attention_mask"].tolist(), reverse=True)
    starts = (sample["position_ids"][real] == 0).cumsum(0).tolist()
    tokens = list(zip(starts, sample["input_ids"][real].tolist(), sample["labels"][real].tolist(), strict=True))
    parts = [list(part) for _, part in groupby(tokens, lambda token: token[0])]
    return [([id for _, id, _ in part], [label for _, _, label in part]) for part in parts]


def labelled(document: Document, most: int | None = None) -> tuple[list[int], list[int]]:
    ids, learned = (each[:most] for each in document)
    labels = [id if at and flag else IGNORE_INDEX for at, (id, flag) in enumerate(zip(ids, learned, strict=True))]
    return ids, labels


@pytest.mark.parametrize("packing", get_args(Packing))
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_each_document_is_whole_in_one_sample(packing: Packing, too_long: TooLong) -> None:
    tokens, documents = rows("..x", ".x.xx", "..xxx..x", "xx", ".xx", "....x", ".x")

    samples = list(PackedDataset(tokens, 6, PAD, packing=packing, too_long=too_long))

    found = sorted(each for sample in samples for each in documents_of(sample))
    kept = [each for each in documents if too_long == "truncate" or len(each[0]) <= 6]
    assert found == [labelled(each, 6) for each in kept]
    assert len(samples) == (len(kept) if packing == "none" else {"truncate": 5, "drop": 4}[too_long])
    assert all(sample["input_ids"].shape == (6,) for sample in samples)
    for sample in samples:
        is_padding = sample["attention_mask"] == 0
        assert set(sample["input_ids"][is_padding].tolist()) <= {PAD}
        assert set(sample["labels"][is_padding].tolist()) <= {IGNORE_INDEX}


def test_split_cuts_where_text_is_cut_and_leaves_out_samples_without_a_label() -> None:
    tokens, _ = rows(".xxx", "........xx", "x.x")

    dataset = PackedDataset(tokens, 4, PAD, too_long="split")

    # Of 0 to 3, 4 to 7, 8 to 11, 12 to 15 and 16: the labels are 1 2 3, 12 13, and 16 begins a sample of one token.
    assert [sample["labels"].tolist() for sample in dataset] == [
        [IGNORE_INDEX, 1, 2, 3],
        [IGNORE_INDEX, 13, IGNORE_INDEX, IGNORE_INDEX],
    ]
    assert dataset.num_learned == 3 + 2 + 1


@pytest.mark.parametrize("too_long", get_args(TooLong))
def test_what_is_not_trained_as_it_is_is_counted_in_one_line(too_long: TooLong) -> None:
    tokens, _ = rows("..x", "......xx", ".xxxxxxx", "...", "x..", ".x")

    fitting = fitting_documents(tokens, 5, too_long)

    kept = {"split": [0, 1, 2, 5], "truncate": [0, 2, 5], "drop": [0, 5]}
    assert fitting.rows.tolist() == kept[too_long]
    long = {"split": "split", "truncate": "truncated", "drop": "left out"}[too_long]
    unlearned = {"split": 2, "truncate": 3, "drop": 2}[too_long]
    within = " within that length" if too_long == "truncate" else ""
    of_long = f"data: of 6 documents 2 are longer than 5 tokens and {long}; "
    assert fitting.note(5, too_long) == of_long + f"{unlearned} have nothing to learn{within} and are left out"
    assert fitting_documents(rows(".x", ".x")[0], 5, too_long).note(5, too_long) is None


def test_learned_tokens_that_all_begin_a_part_are_refused() -> None:
    """What is learned of a document is the first token after each cut, which nothing predicts there."""
    tokens, _ = rows("....x...x")
    with pytest.raises(ValueError, match="no sample of 4 tokens has one that is learned and not the first of its part"):
        PackedDataset(tokens, 4, PAD, too_long="split")


def test_dataset_of_which_nothing_is_learned_is_refused() -> None:
    tokens, _ = rows("x..", "......x")
    said = r"^nothing is learned of the 2 documents of the dataset, 1 of which are longer than seq_len, 5, and trunc"
    with pytest.raises(ValueError, match=said):
        fitting_documents(tokens, 5, "truncate")


def test_text_is_truncated_where_the_user_says_so() -> None:
    features = Features({"input_ids": Sequence(Value("int32"))})
    tokens = Dataset.from_dict({"input_ids": [list(range(9)), [20, 21], [30]]}, features=features)

    assert fitting_documents(tokens, 4, "split").note(4, "split") is None
    assert "1 are longer than 4 tokens and truncated" in str(
        fitting_documents(tokens, 4, "truncate").note(4, "truncate")
    )
    samples = list(PackedDataset(tokens, 4, PAD, too_long="truncate"))
    # A single token has nothing to predict, and no room is given to it.
    assert [[ids for ids, _ in documents_of(sample)] for sample in samples] == [[[0, 1, 2, 3]], [[20, 21]]]


@pytest.mark.parametrize("seed", range(5))
def test_bins_are_the_first_with_room(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 31, int(generator.integers(1, 200)))

    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda each: -lengths[each]):
        room = next((each for each in bins if 30 - lengths[each].sum() >= lengths[index]), None)
        if room is None:
            bins.append([index])
        else:
            room.append(index)

    assert [each.tolist() for each in first_fit_decreasing(lengths, 30)] == sorted(sorted(each) for each in bins)
    assert first_fit_decreasing(lengths[:0], 30) == []


@pytest.mark.parametrize("layer_chunks", [1, 2])
def test_labels_are_those_of_the_next_token_across_the_border_of_shards(layer_chunks: int) -> None:
    tokens, documents = rows("..xx.xxx", ".xx")
    (sample,) = PackedDataset(tokens, 11, PAD, too_long="truncate")
    batch = {name: tensor[None] for name, tensor in sample.items()}

    found = []
    for rank in range(4):
        of_rank = shard(batch, Topology(rank, 4, 4), layer_chunks=layer_chunks)
        found += list(zip(of_rank["input_ids"][0].tolist(), of_rank["shift_labels"][0].tolist(), strict=True))

    expected = {(0, -100), (1, 2), (2, 3), (3, -100), (4, 5), (5, 6), (6, 7), (7, -100), (8, 9), (9, 10), (10, -100)}
    assert set(found) - {(0, -100)} == expected - {(0, -100)}
    assert sum(len(ids) for ids, _ in documents) == 11


def test_samples_of_other_labels_or_cuts_are_others() -> None:
    def loader(learned: str, too_long: TooLong) -> ShardedLoader:
        dataset = PackedDataset(rows(learned, learned)[0], 4, PAD, too_long=too_long)
        return ShardedLoader(dataset, Topology(0, 1, 1), micro_batch_size=1, seed=0)

    state = loader(".xxx", "truncate").state_dict()
    loader(".xxx", "truncate").load_state_dict(state)
    with pytest.raises(ValueError, match="saved with num_learned 6, but this run has num_learned 4"):
        loader("..xx", "truncate").load_state_dict(state)
    with pytest.raises(ValueError, match="saved with too_long 'truncate', but this run has too_long 'split'"):
        loader(".xxx", "split").load_state_dict(state)
    # Text that is split has no such entries, as before there were any.
    features = Features({"input_ids": Sequence(Value("int32"))})
    text = Dataset.from_dict({"input_ids": [[1, 2, 3, 4]] * 2}, features=features)
    of_text = ShardedLoader(PackedDataset(text, 4, PAD), Topology(0, 1, 1), micro_batch_size=1, seed=0)
    assert "too_long" not in of_text.state_dict()
    with pytest.raises(
        ValueError, match="saved with too_long 'truncate' and num_learned 6, but this run has too_long None"
    ):
        of_text.load_state_dict(state)


def write_chats(path: Path, lengths: list[int]) -> Path:
    chats = [
        [{"role": "user", "content": f"{number} " + "?" * length}, {"role": "assistant", "content": "!" * length}]
        for number, length in enumerate(lengths)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return path


@pytest.fixture
def chat_bytes() -> Any:
    """Bytes, in which a chat has its length: every turn has two control tokens."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|u|>", "<|a|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|u|>' if m.role == 'user' else '<|a|>' }}{{ m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|a|>' }}{% endif %}"
    )
    return tokenizer


def test_training_data_of_chats(tmp_path: Path, chat_bytes: Any) -> None:
    path = write_chats(tmp_path / "a.jsonl", [5, 6, 30, 60, 5, 7, 6, 5, 9, 8])
    # 2 turns of 2 control tokens, 2 for "0 ", and twice the length.
    config = TrainConfig(dataset=str(path), seq_len=50, eval_steps=1, eval_samples=1)

    data = load_training_data(config, chat_bytes)

    assert data.note == (
        "data: of 10 documents 2 are longer than 50 tokens and truncated; 1 have nothing to learn within that length "
        "and are left out"
    )
    assert data.held_out is not None
    assert len(data.held_out) == 1
    amounts = data.amounts(1, 1)
    line = describe(amounts, 1)
    assert (
        f"{amounts['documents']} documents, {amounts['tokens']} tokens ({amounts['tokens_learned']} learned), " in line
    )
    everything = load_training_data(TrainConfig(dataset=str(path), seq_len=500, too_long="drop"), chat_bytes)
    lengths = [5, 6, 30, 60, 5, 7, 6, 5, 9, 8]
    assert everything.train.num_tokens == sum(2 * length + 6 for length in lengths)
    assert everything.train.num_learned == sum(length + 1 for length in lengths)
    assert everything.note is None
    # Few chats are less than a sequence, and a sample all the same.
    assert len(everything.train) == 1


@pytest.mark.parametrize(("content", "is_warned_of"), [("a <|a|> b", True), ("a |a| b", False)])
def test_control_tokens_as_letters_are_warned_of_in_messages(
    tmp_path: Path, chat_bytes: Any, content: str, is_warned_of: bool
) -> None:
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}), encoding="utf-8")

    warning = load_training_data(TrainConfig(dataset=str(tmp_path), seq_len=40), chat_bytes).warning

    assert (warning is not None) == is_warned_of
    assert warning is None or "documents spell out '<|a|>', control tokens" in warning


@pytest.mark.parametrize("settings", [{}, {"layer_chunks": 2}])
def test_packed_chats_have_the_loss_and_gradients_of_each_chat_alone(
    tmp_path: Path, chat_bytes: Any, settings: dict[str, Any]
) -> None:
    path = write_chats(tmp_path / "a.jsonl", [3, 9, 1, 12, 5, 7])
    data = load_training_data(TrainConfig(dataset=str(path), seq_len=64), chat_bytes)
    samples = list(data.train)
    assert len(samples) == 2
    assert max(len(documents_of(sample)) for sample in samples) > 2
    model = tiny_llama(vocab_size=len(chat_bytes))
    batch = shard(
        {name: torch.stack([each[name] for each in samples]) for name in samples[0]}, Topology(0, 1, 1), **settings
    )
    num_items = int((batch["shift_labels"] != IGNORE_INDEX).sum())

    alone: dict[str, torch.Tensor] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        prompt = [257, *user["content"].encode(), 256, 258]
        answer = [*assistant["content"].encode(), 256]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[IGNORE_INDEX] * len(prompt) + answer])
        for name, value in loss_and_gradients(
            model, input_ids=ids, labels=labels, num_items_in_batch=num_items
        ).items():
            alone[name] = alone.get(name, 0) + value.clone()

    packed = patched_step(model, {**batch, "num_items_in_batch": num_items}, **settings)
    assert_close(packed, alone, 1e-5)
    assert num_items == sum(length + 1 for length in [3, 9, 1, 12, 5, 7])


def test_a_template_of_a_model_gives_the_same_samples_every_time(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "a.jsonl", [3, 9, 1, 12, 5, 7])
    config = TrainConfig(dataset=str(path), seq_len=128)
    first, second = (list(load_training_data(config, chat_tokenizer("llama3")).train) for _ in range(2))
    assert len(first) == len(second) > 1
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)

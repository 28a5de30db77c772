from __future__ import annotations

from pathlib import Path

import pytest

from mst_ds.config import TrainConfig
from mst_ds.data import PackedDataset, byte_tokenizer, describe, load_training_data


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(str(number) * 99)
    return folder


def digits(dataset: PackedDataset) -> set[int]:
    ids = {token for index in range(len(dataset)) for token in dataset[index]["input_ids"].tolist()}
    return ids - {256}


def test_training_and_held_out_part_share_no_document(folder: Path) -> None:
    config = TrainConfig(dataset=str(folder), seq_len=40, eval_steps=1, eval_samples=4)

    data = load_training_data(config, byte_tokenizer())

    assert data.held_out is not None
    assert len(data.held_out) == 4
    assert data.train.num_tokens == 800
    assert len(digits(data.train)) == 8
    assert not digits(data.train) & digits(data.held_out)


def test_without_packing_a_sample_has_one_document(folder: Path) -> None:
    config = TrainConfig(dataset=str(folder), seq_len=60, eval_steps=1, eval_samples=4, packing="none")

    data = load_training_data(config, byte_tokenizer())

    # A document of 100 tokens is samples of 60 and 40: two documents for 4 samples. Their tokens would take three.
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out)) == (8 * 2, 4)
    assert {int(sample["attention_mask"].sum()) for sample in data.train} == {60, 40}
    assert {len(set(sample["input_ids"].tolist()) - {256}) for sample in data.train} == {1}
    assert len(digits(data.train)) == 8
    assert not digits(data.train) & digits(data.held_out)


def test_without_packing_a_sequence_may_be_longer_than_the_dataset(folder: Path) -> None:
    data = load_training_data(TrainConfig(dataset=str(folder), seq_len=1001, packing="none"), byte_tokenizer())

    assert [int(sample["attention_mask"].sum()) for sample in data.train] == [100] * 10


@pytest.mark.parametrize(("text", "is_warned_of"), [("<|endoftext|>hi", True), ("<|end of text|>", False)])
def test_control_tokens_as_letters_are_warned_of(tmp_path: Path, text: str, is_warned_of: bool) -> None:
    (tmp_path / "a.txt").write_text(text)

    warning = load_training_data(TrainConfig(dataset=str(tmp_path), seq_len=8), byte_tokenizer()).warning

    assert (warning is not None) == is_warned_of
    assert warning is None or "documents spell out '<|endoftext|>', control tokens" in warning


def test_without_evaluation_all_documents_are_for_training(folder: Path) -> None:
    data = load_training_data(TrainConfig(dataset=str(folder), seq_len=40), byte_tokenizer())

    assert data.held_out is None
    assert data.train.num_tokens == 1000
    assert data.train.pad_id == byte_tokenizer().pad_token_id == 256


def test_dataset_shorter_than_one_sequence_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^seq_len is 1001, but the dataset has 1000 tokens"):
        load_training_data(TrainConfig(dataset=str(folder), seq_len=1001), byte_tokenizer())


def test_amounts_are_those_of_the_training_part_in_one_line(folder: Path) -> None:
    data = load_training_data(
        TrainConfig(dataset=str(folder), seq_len=40, eval_steps=1, eval_samples=4), byte_tokenizer()
    )

    amounts = data.amounts(num_steps=15, samples_per_step=2)

    # 8 documents of 99 letters and EOS each.
    line = "data: 8 documents, 800 tokens, 20 samples of 40; 15 steps are 1.5 epochs; 4 samples held out"
    assert describe(amounts, 15) == line
    assert amounts["epochs"] == 30 / 20

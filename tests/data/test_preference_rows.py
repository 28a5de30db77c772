"""Rows with two answers: both documents of a pair are read, kept together, and known by their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from chat_tokenizers import chat_tokenizer
from datasets import Dataset, Features, Sequence, Value
from test_rows import CHAT, OTHER, SHARE_GPT, expected, refusal, tokens_of, write

from mst_ds.config import Packing, TrainConfig
from mst_ds.data import (
    EvalLoader,
    PackedDataset,
    ShardedLoader,
    load_documents,
    load_training_data,
    split_documents,
    tokenise,
)
from mst_ds.data.batching import with_neighbours
from mst_ds.data.fitting import fitting_documents
from mst_ds.data.mixing import mix
from mst_ds.topology import Topology

TOKENIZER = chat_tokenizer("llama3")
PREFERRED = {"objective": "dpo"}
WORSE = {"role": "assistant", "content": "No."}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"chosen": CHAT, "rejected": [CHAT[0], WORSE], "score": 1.0},
        {"chosen": SHARE_GPT, "rejected": [CHAT[0], WORSE], "messages": CHAT},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": [WORSE]},
        # Of some datasets the text of the question stands beside whole chats.
        {"prompt": CHAT[0]["content"], "chosen": CHAT, "rejected": [CHAT[0], WORSE]},
    ],
)
def test_a_row_is_the_chosen_document_and_then_the_rejected_one(tmp_path: Path, kind: str, row: dict[str, Any]) -> None:
    tokens = tokens_of(write(tmp_path, kind, row, row), **PREFERRED)
    assert tokens == [expected(CHAT), expected([CHAT[0], WORSE])] * 2


def test_answers_of_earlier_turns_are_of_the_prompt(tmp_path: Path) -> None:
    row = {"chosen": [*OTHER, *CHAT], "rejected": [*OTHER, CHAT[0], WORSE]}
    (ids, learned), (worse, learned_worse) = tokens_of(write(tmp_path, "jsonl", row), **PREFERRED)
    assert (ids, worse) == (expected(row["chosen"])[0], expected(row["rejected"])[0])
    given = len(expected(OTHER)[0])
    assert not any(learned[:given])
    assert learned[given:] == expected(CHAT)[1][1:]
    assert sum(learned_worse) == sum(expected([CHAT[0], WORSE])[1])


def test_texts_are_a_prompt_and_two_completions(tmp_path: Path) -> None:
    row = {"prompt": "Say a:", "chosen": " b c", "rejected": " d"}
    halves = [{"prompt": "Say a:", "completion": row[name]} for name in ("chosen", "rejected")]
    (tmp_path / "halves").mkdir()
    pair = tokens_of(write(tmp_path, "jsonl", row), **PREFERRED)
    assert pair == tokens_of(write(tmp_path / "halves", "jsonl", *halves))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": CHAT, "rejected": None}, "has no 'rejected'; allowed: a chosen and a rejected answer"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "has the same answer as chosen and as rejected; allowed"),
        ({"chosen": CHAT, "rejected": CHAT}, "has the same answer as chosen and as rejected; allowed"),
        ({"chosen": " b", "rejected": " c"}, "has no prompt and texts as answers; allowed: a text in 'prompt', or"),
        ({"prompt": "a", "chosen": " b", "rejected": ""}, "has an empty answer in 'rejected'; allowed"),
        ({"prompt": "a", "chosen": " b", "rejected": CHAT}, "has a str as chosen and a list as rejected; allowed"),
        ({"chosen": CHAT, "rejected": OTHER}, "has answers that begin with different messages and no messages in"),
        ({"prompt": "a", "chosen": CHAT, "rejected": [CHAT[0], WORSE]}, "has a prompt, 'a', that its answers do not"),
        ({"chosen": CHAT, "rejected": CHAT[:1]}, "has no answer of the assistant in 'rejected'; allowed"),
        ({"chosen": CHAT, "rejected": [CHAT[0], {"role": "judge", "content": "x"}]}, "has the role 'judge'; allowed"),
    ],
)
def test_what_is_no_preference_is_refused_by_its_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"chosen": CHAT, "rejected": [CHAT[0], WORSE]}
    if isinstance(row["chosen"], str):
        good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    path = write(tmp_path, "jsonl", good, row)
    found = refusal(path, **PREFERRED)
    assert message in found
    assert f"line 2 of '{path}'" in found


def test_columns_that_make_no_pair_are_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, "jsonl", {"messages": CHAT}), **PREFERRED) == (
        f"objective is 'dpo', but dataset '{tmp_path / 'a.jsonl'}' has no 'chosen' and no 'rejected', only 'messages'; "
        "allowed: rows with 'chosen' and 'rejected', or another --objective"
    )


def test_an_answer_with_a_label_is_two_documents(tmp_path: Path) -> None:
    """Its own, and behind its prompt the answer of the row before it, of the first row that of the last one."""
    rows = [
        {"prompt": [CHAT[0]], "completion": CHAT[1:], "label": True},
        {"prompt": [OTHER[0]], "completion": [WORSE], "label": False},
    ]
    for kind in ("jsonl", "parquet"):
        config = TrainConfig(dataset=str(write(tmp_path, kind, *rows)), objective="kto")
        tokens = tokenise(load_documents(config), TOKENIZER, rows="labelled")
        chats = [CHAT, [CHAT[0], WORSE], [OTHER[0], WORSE], [OTHER[0], CHAT[1]]]
        assert list(zip(tokens["input_ids"], tokens["learned"], strict=True)) == [expected(chat) for chat in chats]
        assert list(tokens["label"]) == [True, True, False, False]
    bad = write(tmp_path, "jsonl", *rows, {"prompt": "a", "completion": " b", "label": 1})
    assert "has the label 1; allowed: true, of a desirable answer, or false" in refusal(bad, objective="kto")
    message = "has no 'label', only 'prompt', 'completion'; allowed: rows with 'prompt' and 'completion' and 'label'"
    assert message in refusal(write(tmp_path, "jsonl", {"prompt": "a", "completion": " b"}), objective="kto")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_sampled_answer_has_its_advantage_and_what_its_tokens_were(tmp_path: Path, kind: str) -> None:
    """Log-probabilities are of the learned ids, in samples of labels, and shifted with these in a shard."""
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "advantages": 1.5, "old_logps": [-1.0, -2.0]},
        {"input_ids": [8, 9, 4], "labels": [-100, -100, 4], "advantages": -1, "old_logps": None},
    ]
    if kind == "parquet":
        rows = [row | {"advantages": float(row["advantages"])} for row in rows]  # type: ignore[arg-type]
    path = write(tmp_path, kind, *rows)
    data = load_training_data(TrainConfig(dataset=str(path), objective="policy", seq_len=8), TOKENIZER)
    assert data.of_documents["advantages"].tolist() == [1.5, -1.0]
    sample = data.train[0]
    assert sample["documents"].tolist() == [0, 1]
    old = [0, -1, -2, 0, 0, torch.nan, 0, 0]
    torch.testing.assert_close(sample["old_logps"], torch.tensor(old), equal_nan=True)
    batches = [next(iter(EvalLoader(data.train, Topology(rank, 2, 2), micro_batch_size=1))) for rank in range(2)]
    shifted = torch.cat([batch["old_logps"] for batch in batches], dim=1)[0]
    torch.testing.assert_close(shifted, torch.tensor([*old[1:], 0.0]), equal_nan=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"advantages": [1.0]}, "has the advantages [1.0]; allowed: one number for the whole answer"),
        ({"advantages": float("nan")}, "has the advantages nan; allowed"),
        ({"old_logps": [-1.0]}, "has 1 old_logps for 2 learned tokens; allowed: as many; nearest: rows of 'input_ids'"),
        ({"old_logps": [-1.0, 0.5]}, "has 'old_logps' that are no list of log-probabilities; allowed: a number <= 0"),
        ({"input_ids": [1.5, 2.0, 3.0]}, "has 'input_ids' that are no list of whole numbers; allowed"),
    ],
)
def test_what_is_no_rollout_is_refused_by_its_row(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "advantages": 1.5, "old_logps": [-1.0, -2.0]}
    path = write(tmp_path, "jsonl", row, row | changed)
    with pytest.raises(ValueError, match="allowed: ") as caught:
        load_training_data(TrainConfig(dataset=str(path), objective="policy", seq_len=8), TOKENIZER)
    assert f"line 2 of '{path}' {message}" in str(caught.value)


def pairs(*lengths: tuple[int, int], unlearned: tuple[int, ...] = ()) -> Dataset:
    """Documents of these lengths whose ids are their numbers, all but the first token of which is learned."""
    flat = [length for pair in lengths for length in pair]
    ids = [[number] * length for number, length in enumerate(flat)]
    learned = [[number not in unlearned] * length for number, length in enumerate(flat)]
    features = Features({"input_ids": Sequence(Value("int32")), "learned": Sequence(Value("bool"))})
    return Dataset.from_dict({"input_ids": ids, "learned": learned}, features=features)


def documents_in(sample: dict[str, torch.Tensor]) -> list[int]:
    real = sample["attention_mask"] == 1
    return sample["input_ids"][real & (sample["position_ids"] == 0)].tolist()


@pytest.mark.parametrize("packing", get_args(Packing))
def test_pairs_share_a_sample_that_says_which_they_are(packing: Packing) -> None:
    """A document has at most 8 tokens, and a sample 16; of the fourth pair one answer has nothing to learn."""
    tokens = pairs((3, 5), (8, 8), (2, 3), (4, 4), (9, 6), (2, 2), unlearned=(7,))

    dataset = PackedDataset(tokens, 8, 99, packing=packing, too_long="truncate", group=2)

    samples = list(dataset)
    assert all(sample["input_ids"].shape == (16,) for sample in samples)
    assert all(documents_in(sample) == sample["documents"].tolist() for sample in samples)
    assert all(sample["documents"][1::2].equal(sample["documents"][::2] + 1) for sample in samples)
    assert sorted(torch.cat([sample["documents"] for sample in samples]).tolist()) == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11]
    assert len(samples) == (5 if packing == "none" else 4)
    assert dataset.only([1])[0]["documents"].equal(samples[1]["documents"])
    drop = PackedDataset(tokens, 8, 99, packing=packing, too_long="drop", group=2)
    assert sorted(torch.cat([sample["documents"] for sample in drop]).tolist()) == [0, 1, 2, 3, 4, 5, 10, 11]


def test_padding_has_positions_of_an_answer() -> None:
    """A model may have learned no more, and the padding of a sample may be longer."""
    dataset = PackedDataset(pairs((2, 2)), 8, 99, packing="none", too_long="truncate", group=2)
    assert dataset[0]["position_ids"].tolist() == [0, 1, 0, 1, *range(8), *range(4)]
    (batch,) = EvalLoader(dataset, Topology(1, 2, 1), micro_batch_size=1)
    assert batch["position_ids"].tolist() == [[*range(8), *range(8)]]


def test_pairs_are_counted_left_out_held_out_and_mixed_whole() -> None:
    tokens = pairs(*[(3, 4)] * 8, (9, 2), (2, 2), unlearned=(18,))
    fitting = fitting_documents(tokens, 8, "drop", group=2)
    assert fitting.rows.tolist() == list(range(16))
    assert fitting.note(8, "drop") == (
        "data: of 10 pairs 1 are longer than 8 tokens and left out; 1 have nothing to learn and are left out"
    )
    training, held_out = split_documents(tokens, 1, 8, 3, rows=fitting.rows, too_long="drop", group=2)
    assert sorted([*training, *held_out]) == list(range(16))
    for rows in (training, held_out):
        assert (np.diff(rows.reshape(-1, 2)) == 1).all()
        assert (rows[::2] % 2 == 0).all()
    # 16 tokens fill a sample, 7 of a pair.
    assert len(held_out) == 6
    mixture = mix(["a", "b"], [tokens, tokens], [0.75, 0.25], 1, group=2)
    assert len(mixture.rows) == 20 + 6
    assert (mixture.rows[::2] % 2 == 0).all()
    assert mixture.note is not None
    assert "10 of 10 pairs of 'a'" in mixture.note
    assert "3 of 10 pairs of 'b'" in mixture.note


def test_every_rank_of_a_sequence_has_the_numbers_of_all_its_documents() -> None:
    dataset = PackedDataset(pairs(*[(8, 8)] * 3), 8, 99, too_long="truncate", group=2)

    def batches(rank: int) -> list[list[int]]:
        loader = EvalLoader(dataset, Topology(rank, 4, 2), micro_batch_size=1)
        return [batch["documents"].tolist() for batch in loader]

    # Two sequence groups: of the third sample the second one has padding in its place.
    assert [batches(rank) for rank in range(4)] == [[[0, 1], [4, 5]]] * 2 + [[[2, 3], []]] * 2
    batch = next(ShardedLoader(dataset, Topology(1, 2, 2), micro_batch_size=2, seed=0))
    assert len(batch["documents"]) == 4
    assert batch["input_ids"].shape == (2, 8)


def test_an_answer_is_as_long_as_behind_its_own_prompt() -> None:
    """What another prompt's answer makes too long is truncated, and does not take the answer with it."""
    lengths = [(3, 12), (12, 6), (2, 2)]
    tokens = pairs(*lengths).add_column("label", [True] * 6)  # type: ignore[call-arg]
    fitting = fitting_documents(tokens, 8, "drop", group=2)
    assert fitting.rows.tolist() == [0, 1, 4, 5]
    assert fitting.note(8, "drop") == "data: of 3 answers 1 are longer than 8 tokens and left out"
    (sample,) = PackedDataset(tokens, 8, 99, too_long="drop", group=2)
    assert sample["input_ids"].tolist() == [*[0] * 3, *[1] * 8, 4, 4, 5, 5, 99]


def test_no_answer_stands_beside_itself(tmp_path: Path) -> None:
    """Rows are tokenised so many at once; the last one of 1025 would be alone."""
    words = ("a", "b", "c")
    rows = [{"prompt": "q", "completion": " " + words[at % 3] * (1 + at % 7), "label": True} for at in range(1025)]
    config = TrainConfig(dataset=str(write(tmp_path, "jsonl", *rows)), objective="kto")
    ids = tokenise(load_documents(config), TOKENIZER, rows="labelled")["input_ids"]
    assert len(ids) == 2 * 1025
    assert ids[-1] == ids[-4] != ids[-2]
    assert [with_neighbours(at_once, number) for at_once, number in ((1, 4), (2, 7), (4, 9), (8, 1))] == [2, 4, 5, 8]

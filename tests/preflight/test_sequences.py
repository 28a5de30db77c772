"""The packed batch and the rows hold the same documents, so that the loss over one is the loss over the other."""

from __future__ import annotations

import pytest
import torch

from mst_ds.preflight.sequences import Documents
from mst_ds.preflight.shrink import ORIGINAL_POSITIONS
from mst_ds.token_layout import TokenLayout

KINDS = {"packed": Documents.packed(41, 50), "padded": Documents.padded(41, 50)}


def whole(documents: Documents, sp_size: int = 1, chunks: int = 1) -> dict[str, torch.Tensor]:
    """The shards of all ranks put together."""
    layout = TokenLayout(sp_size, chunks)
    shards = [documents.shard(rank, layout) for rank in range(sp_size)]
    return {name: layout.join([shard[name] for shard in shards], dim=1) for name in shards[0]}


@pytest.mark.parametrize(("sp_size", "chunks"), [(1, 1), (2, 1), (3, 1), (2, 3), (3, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_and_targets(kind: str, sp_size: int, chunks: int) -> None:
    documents = KINDS[kind]
    batch, rows = whole(documents, sp_size, chunks), documents.as_rows()
    assert batch["input_ids"].shape == (documents.batch_size, -(-41 // sp_size) * sp_size)
    assert torch.equal(documents.tokens_of_batch(batch["input_ids"]), documents.tokens_of_rows(rows["input_ids"]))
    # transformers predicts label t + 1 from token t.
    shifted = torch.nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=-100)
    targets = documents.tokens_of_batch(batch["shift_labels"])
    assert torch.equal(targets, documents.tokens_of_rows(shifted))
    assert documents.num_items == (targets != -100).sum() == (batch["shift_labels"] != -100).sum()
    assert documents.num_items == (shifted != -100).sum()


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_is_in_one_document_and_all_else_is_padding(kind: str) -> None:
    documents = KINDS[kind]
    batch, rows = whole(documents, 2), documents.as_rows()
    tokens = documents.tokens_of_batch(batch["attention_mask"])
    assert tokens.all()
    assert len(tokens) == batch["attention_mask"].sum() == rows["attention_mask"].sum()
    assert not documents.tokens_of_rows(1 - rows["attention_mask"]).any()
    assert (batch["shift_labels"][batch["attention_mask"] == 0] == -100).all()


def test_positions_restart_with_each_document() -> None:
    batch = whole(KINDS["packed"])
    lengths = ((13, 23, 1, 4), (23, 18))
    for positions, of_row in zip(batch["position_ids"], lengths, strict=True):
        assert positions.tolist() == [position for length in of_row for position in range(length)]
    assert whole(KINDS["padded"])["position_ids"][1].tolist() == [*range(35), *range(6)]


def test_what_a_preflight_has_to_meet() -> None:
    packed = KINDS["packed"]
    border = 21  # of two shards
    spans = [(sum(row[:index]), sum(row[: index + 1])) for row in packed.rows for index in range(len(row))]
    assert any(start < border < stop for start, stop in spans), "no document crosses the border of two shards"
    assert any(0 < start < border for start, _ in spans), "no document begins inside the first shard"
    assert any(stop - start == 1 for start, stop in spans), "no document of one token"
    targets = whole(packed)["shift_labels"]
    assert targets[1, -1] != -100, "the last token of all counts for nothing"
    assert (targets == -100).any(), "no target is ignored"


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_that_depend_on_the_length_are_met_on_both_sides_of_the_original(kind: str) -> None:
    lengths = KINDS[kind].lengths
    assert min(lengths) < ORIGINAL_POSITIONS < max(lengths)
    assert len({length for length in lengths if length > ORIGINAL_POSITIONS}) > 1, "dynamic ones differ by length"

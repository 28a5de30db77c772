from __future__ import annotations

import pytest
import torch

from mst_ds.data import IGNORE_INDEX, ON_HOST, Batch, shard, shift_labels, to_device
from mst_ds.token_layout import TokenLayout
from mst_ds.topology import Topology

PAD = 77


def batch_of(batch_size: int, seq_len: int) -> Batch:
    """Every token another; the labels of the last two positions of the last row are ignored."""
    ids = torch.arange(batch_size * seq_len).reshape(batch_size, seq_len) + 100
    labels = ids.clone()
    labels[-1, -2:] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def shards_of(batch: Batch, sp_size: int) -> list[Batch]:
    """What each rank holds of the tokens."""
    shards = [shard(batch, Topology(rank, sp_size, sp_size), PAD) for rank in range(sp_size)]
    return [{name: tensor for name, tensor in part.items() if name not in ON_HOST} for part in shards]


def test_label_is_the_next_token_and_the_last_has_none() -> None:
    assert shift_labels(torch.tensor([[5, 6, 7], [8, IGNORE_INDEX, 9]])).tolist() == [
        [6, 7, IGNORE_INDEX],
        [IGNORE_INDEX, 9, IGNORE_INDEX],
    ]
    assert shift_labels(torch.tensor([5])).tolist() == [IGNORE_INDEX]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("seq_len", [1, 5, 8, 507])
@pytest.mark.parametrize("sp_size", [1, 2, 3, 4, 8])
def test_shards_side_by_side_are_the_padded_sequence(sp_size: int, seq_len: int, batch_size: int) -> None:
    batch = batch_of(batch_size, seq_len)

    shards = shards_of(batch, sp_size)

    whole = {name: torch.cat([part[name] for part in shards], dim=1) for name in shards[0]}
    padding = -seq_len % sp_size
    length = (seq_len + padding) // sp_size
    assert {part[name].shape for part in shards for name in part} == {(batch_size, length)}
    assert torch.equal(whole["input_ids"][:, :seq_len], batch["input_ids"])
    assert torch.equal(whole["shift_labels"][:, : seq_len - 1], batch["labels"][:, 1:])
    assert (whole["input_ids"][:, seq_len:] == PAD).all()
    assert (whole["shift_labels"][:, seq_len - 1 :] == IGNORE_INDEX).all()
    assert torch.equal(whole["position_ids"][:, :seq_len], torch.arange(seq_len).expand(batch_size, -1))
    assert (whole["position_ids"] < seq_len).all(), "more than the model has learned"
    assert torch.equal(
        whole["attention_mask"], (torch.arange(seq_len + padding) < seq_len).long().expand(batch_size, -1)
    )


@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
def test_documents_and_padding_stay_what_they_are(sp_size: int) -> None:
    # At sp 2 the shards meet at 5, within the second document; at sp 3 and 4 the length does not divide.
    batch = batch_of(2, 10)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
    batch["attention_mask"] = torch.tensor([[1] * 8 + [0] * 2, [1] * 10])
    batch["labels"][(batch["position_ids"] == 0) | (batch["attention_mask"] == 0)] = IGNORE_INDEX

    shards = shards_of(batch, sp_size)

    whole = {name: torch.cat([part[name] for part in shards], dim=1) for name in shards[0]}
    added = -10 % sp_size
    assert torch.equal(whole["position_ids"][:, :10], batch["position_ids"])
    assert torch.equal(whole["attention_mask"][:, :10], batch["attention_mask"])
    assert whole["position_ids"][:, 10:].tolist() == [[*range(added)]] * 2
    assert (whole["attention_mask"][:, 10:] == 0).all()
    assert torch.equal(whole["shift_labels"][:, :9], batch["labels"][:, 1:])
    # The last tokens of both documents in the first row, which would predict another document.
    assert whole["shift_labels"][0, [2, 6]].tolist() == [IGNORE_INDEX] * 2


def test_every_rank_knows_the_documents_of_the_whole_sequence() -> None:
    # 10 tokens in shards of 4, so that the table counts 12 a row.
    batch = batch_of(2, 10)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 0, 1], [*range(10)]])
    batch["attention_mask"] = torch.tensor([[1] * 8 + [0] * 2, [1] * 10])
    batch["labels"][0, 8:] = IGNORE_INDEX

    tables = [shard(batch, Topology(rank, 3, 3))["document_table"].tolist() for rank in range(3)]

    assert tables == [[[3, 1], [0, 3], [3, 4], [7, 1], [8, 0], [12, 10], [22, 0]]] * 3


@pytest.mark.parametrize("sp_size", [2, 3])
def test_labels_positions_and_documents_are_those_of_the_sequence_in_any_number_of_chunks(sp_size: int) -> None:
    # The targets, which the ranks cannot make of their shards, cross chunks and shards.
    batch = batch_of(2, 50)
    batch["position_ids"] = torch.cat([torch.arange(21), torch.arange(29)]).expand(2, -1)
    ranks = [Topology(rank, sp_size, sp_size) for rank in range(sp_size)]
    expected = [shard(batch, topology, PAD) for topology in ranks]
    shards = [shard(batch, topology, PAD, layer_chunks=3) for topology in ranks]

    contiguous, in_chunks = TokenLayout(sp_size), TokenLayout(sp_size, 3)
    for name in expected[0].keys() - ON_HOST:
        one, other = ([part[name] for part in parts] for parts in (expected, shards))
        assert torch.equal(in_chunks.join(other, dim=1), contiguous.join(one, dim=1))
    assert not torch.equal(shards[0]["input_ids"], expected[0]["input_ids"])
    tables = [part["document_table"].tolist() for part in shards]
    assert tables == [[[sp_size, 3], *expected[0]["document_table"].tolist()[1:]]] * sp_size


def test_a_label_on_padding_is_refused() -> None:
    batch = batch_of(1, 8)
    batch["attention_mask"] = torch.tensor([[1] * 6 + [0] * 2])
    batch["labels"][0, 6] = IGNORE_INDEX

    assert shards_of(batch, 1)[0]["shift_labels"][0, 6] == IGNORE_INDEX
    batch["labels"][0, 7] = 5
    with pytest.raises(ValueError, match="labels must be -100 after padding"):
        shards_of(batch, 2)


def test_last_label_of_a_shard_is_the_first_token_of_the_next() -> None:
    first, second = shards_of(batch_of(1, 8), 2)

    assert first["shift_labels"][0, -1] == second["input_ids"][0, 0]


def test_rank_takes_the_shard_of_its_place_in_the_sequence_group() -> None:
    batch = batch_of(1, 8)

    for rank in range(4):
        part = shard(batch, Topology(rank, world_size=4, sp_size=2))
        assert part["position_ids"].tolist() == [[[0, 1, 2, 3], [4, 5, 6, 7]][rank % 2]]


def test_shards_can_be_sent_and_leave_the_batch_as_it_was() -> None:
    batch = batch_of(3, 7)
    before = {name: tensor.clone() for name, tensor in batch.items()}

    for part in shards_of(batch, 2):
        assert all(tensor.is_contiguous() and tensor.dtype == torch.int64 for tensor in part.values())
        for tensor in part.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes  # and not the whole sequence
            tensor.zero_()
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_on_a_device_the_host_still_reads_the_documents() -> None:
    batch = to_device(shard(batch_of(1, 8), Topology(0, 1, 1)), torch.device("meta"))

    assert batch["document_table"].tolist() == [[1, 1], [0, 8]]
    assert {tensor.device.type for name, tensor in batch.items() if name not in ON_HOST} == {"meta"}

"""Where documents begin, from positions and padding; attention that follows from it."""

from __future__ import annotations

import pytest
import torch
from dense_attention import dense_attention, heads
from torch import Tensor, nn

from mst_ds.sequence_parallel import (
    SequenceGroup,
    UlyssesContext,
    document_lengths,
    find_document_starts,
    lengths_of_tokens,
    positions_in_documents,
    run_simulated,
    ulysses_attention,
)
from mst_ds.token_layout import TokenLayout


def find_sharded(positions: list[list[int]], mask: list[list[int]] | None, size: int) -> list[list[int]] | None:
    def shard(values: list[list[int]], group: SequenceGroup) -> Tensor:
        return torch.tensor(values).chunk(group.size, dim=1)[group.rank]

    found = run_simulated(
        lambda group: find_document_starts(shard(positions, group), mask and shard(mask, group), group), size
    )
    assert all(starts == found[0] for starts in found)
    return found[0]


CASES = {
    "one document": ([[0, 1, 2, 3, 4, 5]], None, None),
    "it may begin anywhere": ([[7, 8, 9, 10, 11, 12]], None, None),
    "all tokens": ([[0, 1, 2, 3, 4, 5]], [[1] * 6], None),
    "documents": ([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]], None, [[0, 2, 5], [0]]),
    "a jump forward": ([[0, 1, 2, 5, 6, 7]], None, [[0, 3]]),
    "on the right": ([[0, 1, 2, 3, 4, 5]], [[1, 1, 1, 1, 0, 0]], [[0, 4]]),
    "on the left": ([[0, 1, 2, 3, 4, 5]], [[0, 0, 0, 1, 1, 1]], [[0, 3]]),
    "in the middle": ([[0, 1, 2, 3, 4, 5]], [[1, 0, 0, 1, 1, 1]], [[0, 1, 3]]),
    # As generation counts them: 1 at all padding. One document of padding, not one for each token.
    "on the left, counted apart": ([[1, 1, 1, 0, 1, 2]], [[0, 0, 0, 1, 1, 1]], [[0, 3]]),
    "after documents": ([[0, 1, 0, 1, 0, 0]], [[1, 1, 1, 1, 0, 0]], [[0, 2, 4]]),
    "a row of padding": ([[0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]], [[1] * 6, [0] * 6], None),
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_where_documents_begin(case: str, size: int) -> None:
    positions, mask, expected = CASES[case]
    assert find_sharded(positions, mask, size) == expected
    assert find_document_starts(torch.tensor(positions), mask and torch.tensor(mask), None) == expected


@pytest.mark.parametrize("size", [2, 3])
def test_documents_of_shards_are_those_of_the_sequence(size: int) -> None:
    # 48 tokens: of two ranks in chunks of 8, of three in one of 6 and two of 5. Padding inside of the first row.
    whole = torch.cat([torch.arange(17), torch.arange(31)]), torch.arange(48)
    mask = torch.ones(2, 48, dtype=torch.long)
    mask[0, 17:22] = 0
    positions, layout, chunked = torch.stack(whole), TokenLayout(size), TokenLayout(size, chunks=3)
    starts = find_document_starts(positions, mask, None)
    assert starts == [[0, 17, 22], [0]]
    lengths, of_rows = document_lengths(positions, mask, starts, None), torch.arange(48).expand(2, -1)
    told = [[17, 0, 31], [48]]
    in_documents = positions_in_documents(of_rows, starts, None)

    def function(group: SequenceGroup) -> None:
        own, own_mask, rows = (layout.split(each, dim=1)[group.rank] for each in (positions, mask, of_rows))
        assert find_document_starts(own, own_mask, group) == starts
        of_shard = document_lengths(own, own_mask, starts, group)
        assert torch.equal(of_shard, layout.split(lengths, dim=1)[group.rank])
        assert torch.equal(lengths_of_tokens(starts, told, 48, group), of_shard)
        of_chunks = lengths_of_tokens(starts, told, 48, group, 3)
        assert torch.equal(of_chunks, chunked.split(lengths, dim=1)[group.rank])
        in_shard = positions_in_documents(rows, starts, group)
        assert torch.equal(in_shard, layout.split(in_documents, dim=1)[group.rank])

    run_simulated(function, size)


def test_padding_has_no_length() -> None:
    positions, mask = torch.tensor([[0, 1, 0, 1, 2, 3]]), torch.tensor([[1, 1, 1, 0, 0, 0]])
    starts = find_document_starts(positions, mask, None)
    assert document_lengths(positions, mask, starts, None).tolist() == [[2, 2, 1, 1, 1, 1]]
    assert document_lengths(positions, None, [[0, 2]], None).tolist() == [[2, 2, 4, 4, 4, 4]]


def test_a_mask_may_be_given_on_some_ranks_and_of_any_type() -> None:
    def function(group: SequenceGroup) -> list[list[int]] | None:
        positions = torch.arange(3, dtype=torch.int32)[None] + 3 * group.rank
        return find_document_starts(positions, torch.tensor([[True, False, False]]) if group.rank else None, group)

    assert run_simulated(function, 2) == [[[0, 4]]] * 2


def test_positions_and_mask_travel_together() -> None:
    gathered = []

    class Group:
        rank, size = 0, 2

        def all_gather(self, tensor: Tensor) -> list[Tensor]:
            gathered.append(tensor)
            return [tensor, tensor]

    ones = torch.ones(1, 3)
    assert find_document_starts(torch.arange(3)[None], ones, Group()) == [[0, 3]]
    assert len(gathered) == 1


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.ones(1, 5), r"must be \(batch, 6\), 1 for a token and 0 for padding; got shape \(1, 5\)"),
        (torch.ones(1, 1, 6, 6), "got shape"),
        (torch.tensor([[1, 1, 2, 2, 3, 3]]), "other values"),
        (torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, -1e9]]), "other values"),
    ],
)
def test_masks_that_are_none(mask: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find_document_starts(torch.arange(6)[None], mask, None)


def test_positions_of_one_row_for_all_and_of_three_axes() -> None:
    positions = torch.tensor([[0, 1, 0, 1]])
    assert find_document_starts(positions, torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), None) == [[0, 2], [0, 2, 3]]
    torch.manual_seed(0)
    tensors = heads(2, 1, 1, length=4)
    context = UlyssesContext(None, "sdpa", find_document_starts(positions, None, None))
    output, _ = ulysses_attention(nn.Identity(), *tensors, None, scaling=0.3, ulysses=context)
    torch.testing.assert_close(output, dense_attention(*tensors, scaling=0.3, starts=[[0, 2]] * 2))
    with pytest.raises(ValueError, match=r"must be \(batch, length\), got shape \(3, 1, 4\)"):
        find_document_starts(positions.expand(3, 1, 4), None, None)


@pytest.mark.parametrize("asked", [{}, {"sliding_window": 4}, {"softcap": 2.0}], ids=str)
def test_tokens_never_see_padding(asked: dict[str, float]) -> None:
    # A row padded on the left, one in the middle; both cut in two inside of their tokens.
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = mask[1, 3:5] = 0
    positions = torch.arange(12).expand(2, -1)
    torch.manual_seed(0)
    tensors = heads(2, 1, 1, length=12)

    def attend(group: SequenceGroup) -> Tensor:
        shards = [x.detach().chunk(2, dim=2)[group.rank] for x in tensors]
        of_rank = [x.chunk(2, dim=1)[group.rank] for x in (positions, mask)]
        context = UlyssesContext(group, "sdpa", find_document_starts(*of_rank, group))
        return ulysses_attention(nn.Identity(), *shards, None, scaling=0.3, ulysses=context, **asked)[0]

    output = torch.cat(run_simulated(attend, 2), dim=1)
    spec = {"scaling": 0.3, "window": asked.get("sliding_window"), "softcap": asked.get("softcap")}
    for row, part in ((0, slice(4, 12)), (1, slice(0, 3)), (1, slice(5, 12))):
        alone = dense_attention(*(x[row : row + 1, :, part] for x in tensors), **spec)
        torch.testing.assert_close(output[row : row + 1, part], alone.detach(), rtol=1e-12, atol=1e-13)

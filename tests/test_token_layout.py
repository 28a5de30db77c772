"""Which tokens a rank holds: every token on one rank, chunks that are contiguous over all ranks, and positions that say
which."""

import pytest
import torch

from mst_ds.token_layout import TokenLayout

CPU = torch.device("cpu")


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("seq_len", [1, 3, 31, 1021, 4096])
def test_shards_are_equal_and_hold_each_token_once(seq_len: int, sp_size: int, chunks: int) -> None:
    layout, whole = TokenLayout(sp_size, chunks), torch.arange(2 * seq_len).view(2, seq_len)
    padded = layout.padded(whole, -7)
    assert torch.equal(padded[:, :seq_len], whole)
    assert (padded[:, seq_len:] == -7).all()
    assert padded.shape[1] - seq_len == -seq_len % sp_size
    shards = layout.split(padded, dim=1)
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(layout.join(shards, dim=1), padded)
    for rank, shard in enumerate(shards):
        assert torch.equal(layout.part(padded, rank, dim=1), shard)
        assert torch.equal(padded[:, layout.positions(rank, shard.shape[1], CPU)], shard)


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 13, 29, 100])
def test_a_chunk_of_all_ranks_is_one_stretch_in_equal_pieces(length: int, sp_size: int, chunks: int) -> None:
    layout = TokenLayout(sp_size, chunks)
    of_shard, spans = layout.local_chunks(length), layout.spans(length)
    # Of chunks of fewer than 4 tokens there would be too many.
    assert len(of_shard) == len(spans) == min(chunks, max(1, length // 4))
    assert max(each.stop - each.start for each in of_shard) - min(each.stop - each.start for each in of_shard) <= 1
    assert [position for chunk in of_shard for position in range(chunk.start, chunk.stop)] == [*range(length)]
    assert [position for span in spans for position in range(span.start, span.stop)] == [*range(sp_size * length)]
    of_ranks = [layout.positions(rank, length, CPU) for rank in range(sp_size)]
    for chunk, span in zip(of_shard, spans, strict=True):
        assert torch.cat([positions[chunk] for positions in of_ranks]).tolist() == [*range(span.start, span.stop)]
    for rank, positions in enumerate(of_ranks):
        pieces = layout.pieces(rank, length)
        assert [position for piece in pieces for position in range(piece.start, piece.stop)] == positions.tolist()


def test_one_chunk_is_consecutive_tokens() -> None:
    assert TokenLayout(2).positions(1, 8, CPU).tolist() == [*range(8, 16)]
    assert TokenLayout(2, 2).positions(1, 8, CPU).tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    assert TokenLayout(1, 2).positions(0, 8, CPU).tolist() == [*range(8)]


@pytest.mark.parametrize("chunks", [1, 2])
def test_any_dimension(chunks: int) -> None:
    layout, whole = TokenLayout(2, chunks), torch.arange(2 * 3 * 18).view(2, 3, 18)
    shards = layout.split(whole, dim=2)
    assert torch.equal(shards[1], whole[:, :, layout.positions(1, 9, CPU)])
    assert torch.equal(layout.join(shards, dim=2), whole)

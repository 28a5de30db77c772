"""Which tokens a rank holds: every token on one rank, all shards of one length, and positions that say which."""

import pytest
import torch

from mst_ds.token_layout import TokenLayout

CPU = torch.device("cpu")


@pytest.mark.parametrize("sp_size", [1, 3, 4])
@pytest.mark.parametrize("seq_len", [1, 3, 4096, 1021])
def test_shards_are_equal_and_hold_each_token_once(seq_len: int, sp_size: int) -> None:
    layout, whole = TokenLayout(sp_size), torch.arange(2 * seq_len).view(2, seq_len)
    padded = layout.padded(whole, -7)
    assert torch.equal(padded[:, :seq_len], whole)
    assert (padded[:, seq_len:] == -7).all()
    assert padded.shape[1] - seq_len == -seq_len % sp_size
    shards = layout.split(padded, dim=1)
    assert len({shard.shape for shard in shards}) == 1
    assert torch.equal(layout.join(shards, dim=1), padded)
    for rank, shard in enumerate(shards):
        assert torch.equal(padded[:, layout.positions(rank, shard.shape[1], CPU)], shard)


def test_any_dimension() -> None:
    layout, whole = TokenLayout(2), torch.arange(24).view(2, 3, 4)
    shards = layout.split(whole, dim=2)
    assert torch.equal(shards[1], whole[:, :, layout.positions(1, 2, CPU)])
    assert torch.equal(layout.join(shards, dim=2), whole)

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mst_ds.geometry import HeadLayout
from mst_ds.sequence_parallel import SequenceGroup, run_simulated
from mst_ds.sequence_parallel.all_to_all import gather_sequence, scatter_sequence
from mst_ds.sequence_parallel.head_exchange import HeadExchange
from mst_ds.token_layout import TokenLayout


@pytest.mark.parametrize("size", [2, 3])
def test_heads_of_the_whole_sequence_come_and_go_in_its_order(size: int) -> None:
    # Shards of 14 tokens in chunks of 5, 5 and 4.
    heads = HeadLayout(num_heads=4, num_key_value_heads=4, sp_size=size)
    whole, layout, in_chunks = torch.randn(2, 4, 14 * size, 3), TokenLayout(size), TokenLayout(size, chunks=3)
    of_ranks = [(heads.query_heads(rank),) for rank in range(size)]

    def function(group: SequenceGroup) -> None:
        own = layout.split(whole, dim=2)[group.rank]
        (gathered,) = gather_sequence([own], of_ranks, group)
        (mine,) = of_ranks[group.rank]
        assert torch.equal(gathered, whole[:, mine.start : mine.stop])
        received = scatter_sequence([gathered], of_ranks, group)
        assert torch.equal(torch.cat([part for (part,) in received], dim=1), own)
        # A chunk alone, as any tokens of equal number: one stretch of the sequence.
        own = in_chunks.split(whole, dim=2)[group.rank]
        for chunk, span in zip(in_chunks.local_chunks(14), in_chunks.spans(14), strict=True):
            (stretch,) = gather_sequence([own[:, :, chunk]], of_ranks, group)
            assert torch.equal(stretch, whole[:, mine.start : mine.stop, span])

    run_simulated(function, size)


def test_gradients_of_a_shared_head_are_not_rounded_one_by_one() -> None:
    # The one key head goes to all three ranks. In bf16 256 + 1 is 256, but 256 + 1 + 1 is 258.
    def function(group: SequenceGroup) -> Tensor:
        exchange = HeadExchange(group, HeadLayout(3, 1, 3))
        of_group = [torch.full((1, 1, 6, 4), 256.0 if group.rank == 0 else 1.0).bfloat16()] * 3
        tensors = [torch.zeros(1, heads, 2, 4).bfloat16() for heads in (3, 1, 1)]
        grads = exchange.sums_for(tensors)
        exchange.scatter_gradients(of_group, 0, grads)
        return grads[1].bfloat16()

    for grad in run_simulated(function, 3):
        assert bool((grad == 258).all())

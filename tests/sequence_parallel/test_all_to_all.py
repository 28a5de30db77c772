from __future__ import annotations

import torch
from torch import Tensor

from mst_ds.attention import AttentionSpec, CausalAttention
from mst_ds.geometry import HeadLayout
from mst_ds.sequence_parallel import SequenceGroup, run_simulated
from mst_ds.sequence_parallel.sequence_attention import SequenceAttention


def test_gradients_of_a_shared_head_are_not_rounded_one_by_one() -> None:
    # The one key head goes to all three ranks. In bf16 256 + 1 is 256, but 256 + 1 + 1 is 258.
    whole = CausalAttention("sdpa"), AttentionSpec(1.0)

    def function(group: SequenceGroup) -> Tensor:
        attention = SequenceAttention(*whole, group, HeadLayout(3, 1, 3))
        of_group = [torch.full((1, 1, 6, 4), 256.0 if group.rank == 0 else 1.0).bfloat16()] * 3
        tensors = [torch.zeros(1, heads, 2, 4).bfloat16() for heads in (3, 1, 1)]
        grads = attention.sums_for(tensors)
        attention.scatter_gradients(of_group, 0, grads)
        return grads[1].bfloat16()

    for grad in run_simulated(function, 3):
        assert bool((grad == 258).all())

from __future__ import annotations

import torch
from torch import Tensor

from mst_ds.ulysses import SequenceGroup, run_simulated
from mst_ds.ulysses.all_to_all import sequence_to_heads
from mst_ds.ulysses.layout import HeadLayout


def test_gradients_of_a_shared_head_are_not_rounded_one_by_one() -> None:
    # The one key head goes to all three ranks. In bf16 256 + 1 is 256, but 256 + 1 + 1 is 258.
    def function(group: SequenceGroup) -> Tensor:
        query, key = torch.zeros(1, 3, 2, 4).bfloat16(), torch.zeros(1, 1, 2, 4).bfloat16().requires_grad_()
        _, keys, _ = sequence_to_heads(query, key, key.detach(), HeadLayout(3, 1, 3), group)
        keys.backward(torch.full_like(keys, 256.0 if group.rank == 0 else 1.0))
        return key.grad

    for grad in run_simulated(function, 3):
        assert bool((grad == 258).all())

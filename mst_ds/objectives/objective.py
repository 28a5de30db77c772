"""What the training loop asks of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn


class Objective(Protocol):
    """A loss that is a mean over the items of a step, whatever ranks, shards and micro-batches these lie in.

    The loop sums `num_items` over ranks and micro-batches first and hands the sum to each `loss`: one item, one weight.
    """

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """Items of this rank's shard of a micro-batch."""

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int) -> Tensor:
        """The sum of the shard's losses divided by `num_items`; a scalar whose sum over all shards is the step's loss.

        Args:
            model: a patched model, or the DeepSpeed engine around it.
            batch: this rank's shard, see `mst_ds.data.shard`, on the model's device.
        """

"""What the training loop asks of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Measured:
    """What a shard adds to a step.

    Attributes:
        loss: the sum of the shard's losses divided by the step's items; a scalar whose sum over all shards is the
            step's loss.
        metrics: what is logged beside it, by name, divided in the same way; without a gradient.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """A loss that is a mean over the items of a step, whatever ranks, shards and micro-batches these lie in.

    The loop sums `num_items` over ranks and micro-batches first and hands the sum to each `measure`: one item, one
    weight.
    """

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """Items of this rank's shard of a micro-batch."""

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int) -> Measured:
        """What this shard adds to the step.

        Args:
            model: a patched model, or the DeepSpeed engine around it.
            batch: this rank's shard, see `mst_ds.data.shard`, on the model's device.
        """

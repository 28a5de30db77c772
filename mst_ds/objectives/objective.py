"""What the training loop asks of an objective."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mst_ds.sequence_parallel import SequenceGroup


@dataclass(frozen=True)
class Measured:
    """What a shard adds to a step.

    Attributes:
        loss: the sum of the shard's losses divided by the step's items; a scalar whose sum over all shards is the
            step's loss.
        metrics: of what is logged beside it, by name, (2,): the sum over this shard's share of what there is, and the
            number. The step's value is the mean. Without a gradient.
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


def counted_once(number: int, group: SequenceGroup | None) -> int:
    """Of items that lie on all ranks of a sequence: the first rank counts them."""
    return number if group is None or group.rank == 0 else 0


def with_router_loss(loss: Tensor, model: nn.Module, output: Any, share: Tensor) -> Tensor:
    """The loss with the router's of a mixture of experts, where there is one, which is already this rank's part.

    Args:
        share: the items of these sequences, of those of the step.
    """
    if output.get("aux_loss") is None:
        return loss
    weighed: Tensor = loss + getattr(model, "router_aux_loss_coef", 0.0) * output.aux_loss * share
    return weighed


def ranks_of(group: SequenceGroup | None) -> int:
    """Ranks that share a sequence."""
    return 1 if group is None else group.size


def share_of_mean(values: Tensor, group: SequenceGroup | None, mask: Tensor | None = None) -> Tensor:
    """A metric of `Measured`: of values that all ranks of the group have each answers for its part.

    Args:
        mask: which values count; default: all.
    """
    counted = torch.ones_like(values) if mask is None else mask.to(values.dtype)
    return torch.stack([(values * counted).sum(), counted.sum()]).detach() / ranks_of(group)

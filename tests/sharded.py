"""A model on the shards of a sequence, on a simulated sequence group: what it must have in common with the whole."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from plain_model import shift
from tiny import tiny_settings
from torch import Tensor

from mst_ds import apply_settings
from mst_ds.sequence_parallel import SequenceGroup, run_simulated


def sharded_loss_and_gradients(
    model: torch.nn.Module,
    batch: Mapping[str, Tensor],
    sp_size: int = 2,
    *,
    num_items_in_batch: int | None = None,
    forward: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """The sum over the ranks of their losses and gradients; each rank has a copy of `model` and its shard of `batch`.

    Args:
        batch: tensors (B, S) with `labels`, not shifted; S is a multiple of `sp_size`.
        num_items_in_batch: None means the number of valid labels.
        forward: further arguments of the model.
        settings: of the plan.
    """
    tensors = dict(batch)
    tensors["shift_labels"] = shift(tensors.pop("labels"), batch.get("position_ids"), batch.get("attention_mask"))
    num_items = int((tensors["shift_labels"] != -100).sum()) if num_items_in_batch is None else num_items_in_batch
    copies = [copy.deepcopy(model) for _ in range(sp_size)]

    def run(group: SequenceGroup) -> Tensor:
        rank, own = group.rank, copies[group.rank]
        apply_settings(own, tiny_settings(sp_size, **settings), sequence_group=group)
        shard = {name: tensor.chunk(sp_size, dim=1)[rank] for name, tensor in tensors.items()}
        loss = own(**shard, num_items_in_batch=num_items, **(forward or {})).loss
        loss.backward()
        return loss.detach()

    results = {"loss": torch.stack(run_simulated(run, sp_size)).sum()}
    for named in zip(*(own.named_parameters() for own in copies), strict=True):
        results[named[0][0]] = sum(parameter.grad for _, parameter in named)
    return results

"""A model on the shards of a sequence, on a simulated sequence group: what it must have in common with the whole."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from plain_model import gradients_of, shift
from tiny import tiny_settings
from torch import Tensor

from mst_ds import apply_settings
from mst_ds.data import Batch, shard
from mst_ds.document_table import document_table
from mst_ds.sequence_parallel import SequenceGroup, run_simulated
from mst_ds.token_layout import TokenLayout
from mst_ds.topology import Topology


def plain_shards(batch: Mapping[str, Tensor], sp_size: int, layer_chunks: int = 1) -> list[Batch]:
    """Equal parts of each chunk of a length that `sp_size` divides, with their targets, and none of the package's
    code, but for the table of documents that several chunks need."""
    tensors = dict(batch)
    tensors["shift_labels"] = shift(tensors.pop("labels"), batch.get("position_ids"), batch.get("attention_mask"))
    length = tensors["shift_labels"].shape[1] // sp_size
    if layer_chunks > 1:
        assert length >= 4 * layer_chunks  # else there are fewer
        tensors.setdefault("position_ids", torch.arange(sp_size * length).expand_as(tensors["shift_labels"]))
    chunks = [sp_size * len(chunk) for chunk in torch.arange(length).tensor_split(layer_chunks)]
    parts = {}
    for name, tensor in tensors.items():
        of_chunks = [stretch.chunk(sp_size, dim=1) for stretch in tensor.split(chunks, dim=1)]
        parts[name] = [torch.cat(of_rank, dim=1) for of_rank in zip(*of_chunks, strict=True)]
    shards = [{name: of_ranks[rank] for name, of_ranks in parts.items()} for rank in range(sp_size)]
    if layer_chunks > 1:
        table = document_table(tensors["position_ids"], batch.get("attention_mask"), TokenLayout(sp_size, layer_chunks))
        shards = [{**each, "document_table": table} for each in shards]
    return shards


def shards_of_a_run(batch: Mapping[str, Tensor], sp_size: int, layer_chunks: int = 1) -> list[Batch]:
    """As a run's loader makes them, of any length."""
    ranks = [Topology(rank, sp_size, sp_size) for rank in range(sp_size)]
    return [shard(dict(batch), topology, layer_chunks=layer_chunks) for topology in ranks]


def sharded_loss_and_gradients(
    model: torch.nn.Module,
    batch: Mapping[str, Tensor],
    sp_size: int = 2,
    *,
    split: Callable[[Mapping[str, Tensor], int, int], list[Batch]] = plain_shards,
    num_items_in_batch: int | None = None,
    forward: Mapping[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """The sum over the ranks of their losses and gradients; each rank has a copy of `model` and its shard of `batch`.

    Args:
        batch: tensors (B, S) with `labels`, not shifted.
        split: how it becomes shards.
        num_items_in_batch: None means the number of valid labels.
        forward: further arguments of the model.
        settings: of the plan.
    """
    shards = split(batch, sp_size, settings.get("layer_chunks", 1))
    valid = sum(int((each["shift_labels"] != -100).sum()) for each in shards)
    num_items = valid if num_items_in_batch is None else num_items_in_batch
    copies = [copy.deepcopy(model) for _ in range(sp_size)]

    def run(group: SequenceGroup) -> Tensor:
        own = copies[group.rank]
        apply_settings(own, tiny_settings(sp_size, **settings), sequence_group=group)
        loss = own(**shards[group.rank], num_items_in_batch=num_items, **(forward or {})).loss
        loss.backward()
        return loss.detach()

    results = {"loss": torch.stack(run_simulated(run, sp_size)).sum()}
    of_ranks = [gradients_of(own) for own in copies]
    for name in dict.fromkeys(name for of_rank in of_ranks for name in of_rank):
        results[name] = sum(of_rank[name] for of_rank in of_ranks if name in of_rank)
    return results

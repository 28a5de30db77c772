"""From samples of full length to this rank's shard of them."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.topology import Topology, shard_length, shard_slice

Batch: TypeAlias = dict[str, Tensor]

IGNORE_INDEX = -100
"""The label of a position that does not count in the loss, as in `torch.nn.functional.cross_entropy`."""


def shift_labels(labels: Tensor) -> Tensor:
    """The label of each position is the next token; the last has none.

    (B, S) -> (B, S), or (S,) -> (S,). S must be the full length: the label of a shard's last position is the
    first token of the next shard.
    """
    return pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)


def shard(batch: Batch, topology: Topology, pad_id: int = 0) -> Batch:
    """This rank's part of a batch that every rank of its sequence group holds in full: nothing is exchanged.

    Args:
        batch: {"input_ids": (B, S), "labels": (B, S)}, int64, the labels not shifted.
        pad_id: the id on padding at the end, where S is no multiple of sp_size. No earlier position sees it.

    Returns:
        {"input_ids": (B, L), "shift_labels": (B, L), "position_ids": (B, L)}, int64, L = ceil(S / sp_size).
    """
    input_ids = batch["input_ids"]
    batch_size, seq_len = input_ids.shape
    part = shard_slice(seq_len, topology.sp_size, topology.sp_rank)
    padding = (0, topology.sp_size * shard_length(seq_len, topology.sp_size) - seq_len)
    shifted = pad(shift_labels(batch["labels"]), padding, value=IGNORE_INDEX)
    return {
        "input_ids": pad(input_ids, padding, value=pad_id)[:, part].contiguous(),
        "shift_labels": shifted[:, part].contiguous(),
        "position_ids": torch.arange(part.start, part.stop).repeat(batch_size, 1),
    }

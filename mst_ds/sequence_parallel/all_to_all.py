"""The two exchanges of Ulysses attention (arXiv 2309.14509, section 3.1), one collective each.

L is a shard's length, S = sp_size * L the whole sequence. Splits may be uneven, so `all_to_all_single` on a flat buffer
is used throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mst_ds.token_layout import TokenLayout

from .groups import SequenceGroup


def gather_sequence(
    tensors: Sequence[Tensor], heads: Sequence[Sequence[range]], group: SequenceGroup
) -> tuple[Tensor, ...]:
    """This rank's heads of the whole sequence, in exchange for this shard's heads of the other ranks.

    Args:
        tensors: (B, N_i, L, D_i) of this shard, of one dtype.
        heads: for each rank the range of heads of each tensor that it works on.

    Returns:
        (B, n_i, S, D_i), with n_i this rank's heads.
    """
    sends = [
        [tensor[:, part.start : part.stop] for tensor, part in zip(tensors, of_rank, strict=True)] for of_rank in heads
    ]
    shapes = [
        torch.Size((tensor.shape[0], len(part), *tensor.shape[2:]))
        for tensor, part in zip(tensors, heads[group.rank], strict=True)
    ]
    received = _exchange(sends, [shapes] * group.size, group)
    # received[source][i] is (B, n_i, L, D_i).
    layout = TokenLayout(group.size)
    return tuple(layout.join(shards, dim=2) for shards in zip(*received, strict=True))


def scatter_sequence(
    tensors: Sequence[Tensor], heads: Sequence[Sequence[range]], group: SequenceGroup
) -> list[list[Tensor]]:
    """The way back: the other ranks' heads of this shard, in exchange for their shards of this rank's heads.

    Args:
        tensors: (B, n_i, S, D_i) of this rank's heads, of one dtype.
        heads: for each rank the range of heads of each tensor that it has worked on.

    Returns:
        From each rank a (B, len(heads[rank][i]), L, D_i) for each tensor, views of one buffer.
    """
    shards = [TokenLayout(group.size).split(tensor, dim=2) for tensor in tensors]
    shapes = [
        [
            torch.Size((tensor.shape[0], len(part), tensor.shape[2] // group.size, tensor.shape[3]))
            for tensor, part in zip(tensors, of_rank, strict=True)
        ]
        for of_rank in heads
    ]
    return _exchange([list(of_rank) for of_rank in zip(*shards, strict=True)], shapes, group)


def _exchange(
    sends: list[list[Tensor]], receive_shapes: list[list[torch.Size]], group: SequenceGroup
) -> list[list[Tensor]]:
    """Send the tensors `sends[rank]` to each rank; return those received from each, views into one flat buffer."""
    reference = sends[0][0]
    assert all(tensor.dtype == reference.dtype for tensors in sends for tensor in tensors)
    send_splits = [sum(tensor.numel() for tensor in tensors) for tensors in sends]
    receive_splits = [sum(shape.numel() for shape in shapes) for shapes in receive_shapes]
    send = reference.new_empty(sum(send_splits))
    offset = 0
    for tensor in (tensor for tensors in sends for tensor in tensors):
        send[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
        offset += tensor.numel()
    received = reference.new_empty(sum(receive_splits))
    group.all_to_all(received, send, receive_splits, send_splits)
    flat = iter(received.split([shape.numel() for shapes in receive_shapes for shape in shapes]))
    return [[next(flat).view(shape) for shape in shapes] for shapes in receive_shapes]

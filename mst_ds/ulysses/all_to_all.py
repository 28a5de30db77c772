"""The two exchanges of Ulysses attention (arXiv 2309.14509, section 3.1), one collective each way.

L is a shard's length, S = sp_size * L the whole sequence, N and K the model's query and key/value heads, n and k those
of one rank, D the head dim. Splits may be uneven, so `all_to_all_single` on a flat buffer is used throughout.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .groups import SequenceGroup
from .layout import HeadLayout


def sequence_to_heads(
    query: Tensor, key: Tensor, value: Tensor, layout: HeadLayout, group: SequenceGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """This shard, query (B, N, L, D), key, value (B, K, L, D) -> this rank's heads, (B, n, S, D) and (B, k, S, D)."""
    return _SequenceToHeads.apply(query, key, value, layout, group)


def heads_to_sequence(output: Tensor, layout: HeadLayout, group: SequenceGroup) -> Tensor:
    """(B, n, S, D) attention output of this rank's heads -> (B, L, N, D) of this shard, all heads."""
    return _HeadsToSequence.apply(output, layout, group)


class _SequenceToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: HeadLayout, group: SequenceGroup
    ) -> tuple[Tensor, ...]:
        ctx.layout, ctx.group = layout, group
        ctx.shapes = [tensor.shape for tensor in (query, key, value)]
        ranges = _head_ranges(layout)
        sends = [
            [tensor[:, heads.start : heads.stop] for tensor, heads in zip((query, key, value), of_rank, strict=True)]
            for of_rank in ranges
        ]
        mine = ranges[group.rank]
        shapes = [
            _with(shape, heads=len(heads), length=shape[2]) for shape, heads in zip(ctx.shapes, mine, strict=True)
        ]
        received = _exchange(sends, [shapes] * layout.sp_size, group)
        # received[source][tensor] is (B, heads, L, D): the shards follow each other along the sequence.
        return tuple(torch.cat([of_source[index] for of_source in received], dim=2) for index in range(3))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layout, group = ctx.layout, ctx.group
        ranges = _head_ranges(layout)
        sends = _split_sequence(grads, layout.sp_size)
        shapes = [
            [_with(shape, heads=len(heads), length=shape[2]) for shape, heads in zip(ctx.shapes, of_rank, strict=True)]
            for of_rank in ranges
        ]
        received = _exchange(sends, shapes, group)
        results = []
        for index, shape in enumerate(ctx.shapes):
            # A key/value head that went to several ranks gets one gradient from each; their sum is not rounded early.
            dtype = grads[index].dtype
            total = grads[index].new_zeros(shape, dtype=torch.promote_types(dtype, torch.float32) if index else dtype)
            for of_rank, of_source in zip(ranges, received, strict=True):
                total[:, of_rank[index].start : of_rank[index].stop] += of_source[index]
            results.append(total.to(dtype))
        return *results, None, None


class _HeadsToSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, layout: HeadLayout, group: SequenceGroup) -> Tensor:
        ctx.layout, ctx.group, ctx.shape = layout, group, output.shape
        length = output.shape[2] // layout.sp_size
        shapes = [
            [_with(output.shape, heads=len(layout.query_heads(rank)), length=length)] for rank in range(layout.sp_size)
        ]
        received = _exchange(_split_sequence((output,), layout.sp_size), shapes, group)
        return torch.cat([of_source[0].transpose(1, 2) for of_source in received], dim=2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout, group = ctx.layout, ctx.group
        sends = []
        for rank in range(layout.sp_size):
            heads = layout.query_heads(rank)
            sends.append([grad[:, :, heads.start : heads.stop].transpose(1, 2)])
        shape = _with(ctx.shape, heads=ctx.shape[1], length=ctx.shape[2] // layout.sp_size)
        received = _exchange(sends, [[shape]] * layout.sp_size, group)
        return torch.cat([of_source[0] for of_source in received], dim=2), None, None


def _head_ranges(layout: HeadLayout) -> list[tuple[range, range, range]]:
    """For each rank the heads of query, key and value it works on."""
    ranks = range(layout.sp_size)
    return [(layout.query_heads(r), layout.key_value_heads(r), layout.key_value_heads(r)) for r in ranks]


def _split_sequence(tensors: tuple[Tensor, ...], parts: int) -> list[list[Tensor]]:
    """For each rank its shard of each (B, heads, S, D) tensor."""
    shards = [tensor.chunk(parts, dim=2) for tensor in tensors]
    return [list(of_rank) for of_rank in zip(*shards, strict=True)]


def _with(shape: torch.Size, *, heads: int, length: int) -> torch.Size:
    return torch.Size((shape[0], heads, length, shape[3]))


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

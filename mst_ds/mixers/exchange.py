"""What the ranks of a sequence exchange for a mixer, with the way back of gradients.

L is a shard's length, S the whole sequence's; shards are consecutive tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from mst_ds.dtypes import sum_dtype
from mst_ds.sequence_parallel import SequenceGroup
from mst_ds.sequence_parallel.all_to_all import gather_sequence, scatter_sequence


def tokens_before(
    tensor: Tensor, earlier: Tensor | None, count: int, group: SequenceGroup | None
) -> tuple[Tensor, Tensor]:
    """The last tokens before this rank's, and the last of all ranks; one all-gather.

    Args:
        tensor: (B, C, L), of this rank.
        earlier: (B, C, count), the last tokens before all ranks', the same on each; None: there are none, which is 0.

    Returns:
        both (B, C, count). The gradient of `earlier` is that of all ranks, and so has that of the last tokens to be.
    """
    if earlier is None:
        earlier = tensor.new_zeros(*tensor.shape[:2], count)
    if group is None:
        return earlier, torch.cat([earlier, tensor[:, :, -count:]], dim=2)[:, :, -count:]
    before, last = _TokensBefore.apply(tensor, earlier, group)
    return before, last


def gather_heads(tensors: Sequence[Tensor], heads: Sequence[Sequence[range]], group: SequenceGroup) -> list[Tensor]:
    """This rank's heads of the whole sequence, in exchange for this shard's heads of the other ranks.

    Args:
        tensors: (B, N_i, L, D_i) of this shard, of any dtypes: one all-to-all for each.
        heads: for each rank the range of heads of each tensor that it works on; a head may be in several.

    Returns:
        (B, n_i, S, D_i), with n_i this rank's heads.
    """
    gathered: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
        of_dtype = [[of_rank[place] for place in places] for of_rank in heads]
        found = _GatherHeads.apply(group, of_dtype, *(tensors[place] for place in places))
        gathered.update(zip(places, found, strict=True))
    return [gathered[place] for place in range(len(tensors))]


def scatter_heads(tensor: Tensor, heads: Sequence[range], group: SequenceGroup) -> Tensor:
    """The way back: (B, n, S, D) of this rank's heads -> (B, N, L, D) of this shard.

    Args:
        heads: for each rank the range of heads that it has worked on, one after another.
    """
    scattered: Tensor = _ScatterHeads.apply(group, heads, tensor)
    return scattered


class _TokensBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, earlier: Tensor, group: SequenceGroup) -> tuple[Tensor, Tensor]:
        # Shards may be shorter than what is asked for.
        length, count = tensor.shape[2], earlier.shape[2]
        ctx.length, ctx.count, ctx.kept, ctx.group = length, count, min(count, length), group
        tails = group.all_gather(tensor[:, :, length - ctx.kept :].contiguous())
        before = torch.cat([earlier, *tails[: group.rank]], dim=2)[:, :, -count:]
        return before.clone(), torch.cat([earlier, *tails], dim=2)[:, :, -count:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, d_last: Tensor) -> tuple[Tensor | None, ...]:
        group, kept, count = ctx.group, ctx.kept, ctx.count
        # On every rank, as the sum is a collective call: of the earlier tokens, and then of the tails of all ranks.
        total = pad(grad, (group.rank * kept, (group.size - group.rank) * kept))
        total = total.to(sum_dtype(grad.dtype), copy=True)
        group.all_reduce(total)
        total[:, :, -count:] += d_last
        start = count + group.rank * kept
        own = total[:, :, start : start + kept].to(grad.dtype)
        return pad(own, (ctx.length - kept, 0)), total[:, :, :count].to(grad.dtype), None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, group: SequenceGroup, heads: Sequence[Sequence[range]], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.heads, ctx.counts = group, heads, [tensor.shape[1] for tensor in tensors]
        return gather_sequence(tensors, heads, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        received = scatter_sequence(grads, ctx.heads, ctx.group)
        totals = []
        for place, count in enumerate(ctx.counts):
            like = received[0][place]
            # Several ranks may have worked on a head: their sum is rounded once.
            total = like.new_zeros(like.shape[0], count, *like.shape[2:], dtype=sum_dtype(like.dtype))
            for of_rank, parts in zip(ctx.heads, received, strict=True):
                total[:, of_rank[place].start : of_rank[place].stop] += parts[place]
            totals.append(total.to(like.dtype))
        return None, None, *totals


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: SequenceGroup, heads: Sequence[range], tensor: Tensor) -> Tensor:
        ctx.group, ctx.heads = group, [(of_rank,) for of_rank in heads]
        received = scatter_sequence([tensor], ctx.heads, group)
        return torch.cat([part for (part,) in received], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (gathered,) = gather_sequence([grad], ctx.heads, ctx.group)
        return None, None, gathered

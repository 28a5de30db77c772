"""The heads of a shard in exchange for one rank's heads of the whole sequence, in groups, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mst_ds.attention.documents import on_device
from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import HeadLayout

from .all_to_all import gather_sequence, scatter_sequence
from .groups import SequenceGroup


@dataclass(frozen=True)
class HeadExchange:
    """Of a shard, or of the same chunk of all shards, which is as long and one stretch of the sequence.

    Args:
        group: the sequence group; None where the sequence is not sharded, and nothing is exchanged.
        layout: which heads each rank works on, and in how many groups.
    """

    group: SequenceGroup | None
    layout: HeadLayout

    def gathered(self, tensors: Sequence[Tensor], head_group: int) -> list[Tensor]:
        """Query, key and value, or query alone, (B, N, L, D) -> (B, n, S, D) of one group of this rank's heads."""
        if self.group is None:
            return list(tensors)
        heads = [of_rank[: len(tensors)] for of_rank in self._heads(head_group)]
        return list(gather_sequence(tensors, heads, self.group))

    def gathered_keys(self, tensors: Sequence[Tensor], head_group: int) -> list[Tensor]:
        """Of query, key and value the last two."""
        if self.group is None:
            return list(tensors[1:3])
        heads = [of_rank[1:] for of_rank in self._heads(head_group)]
        return list(gather_sequence(tensors[1:3], heads, self.group))

    def sinks(self, tensors: Sequence[Tensor], head_group: int) -> list[Tensor]:
        """(N,) each -> those of one group of this rank's heads."""
        if self.group is None:
            return list(tensors)
        heads = self.layout.query_heads(self.group.rank, head_group)
        return [sinks[heads.start : heads.stop] for sinks in tensors]

    def copied(self, of_keys: Tensor, head_group: int) -> Tensor:
        """Keys or values with a copy for each query head, where plain groups do not say which one it reads."""
        index = self._key_value_index(head_group)
        return of_keys if index is None else of_keys[:, on_device(index, of_keys.device)]

    def summed(self, grad: Tensor, head_group: int) -> Tensor:
        """The gradient of what `copied` was given, from that of what it gave; the sum is not rounded early."""
        index = self._key_value_index(head_group)
        if index is None:
            return grad
        total = grad.new_zeros(grad.shape[0], max(index) + 1, *grad.shape[2:], dtype=sum_dtype(grad.dtype))
        return total.index_add_(1, on_device(index, grad.device), grad.to(total.dtype)).to(grad.dtype)

    def gathered_outputs(self, tensors: Sequence[Tensor], head_group: int) -> Sequence[Tensor]:
        """(B, L, N, D) tensors of this shard -> (B, n, S, D) of one group of this rank's heads."""
        of_heads = [tensor.transpose(1, 2) for tensor in tensors]
        if self.group is None:
            return of_heads
        heads = [(queries,) * len(tensors) for queries, *_ in self._heads(head_group)]
        return gather_sequence(of_heads, heads, self.group)

    def scatter_output(self, of_group: Tensor, head_group: int, output: Tensor | None, num_heads: int) -> Tensor:
        """Put the output of one group of heads, (B, n, S, D), into this shard's, (B, L, N, D), which is made for the
        first."""
        if self.group is None:
            return of_group.transpose(1, 2).contiguous()
        heads = [(queries,) for queries, *_ in self._heads(head_group)]
        received = scatter_sequence([of_group], heads, self.group)
        for (part,), (tensor,) in zip(heads, received, strict=True):
            if output is None:
                output = tensor.new_empty(tensor.shape[0], tensor.shape[2], num_heads, tensor.shape[3])
            output[:, :, part.start : part.stop] = tensor.transpose(1, 2)
        assert output is not None
        return output

    def sums_for(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Zeros for the gradients of this shard; in fp32 at least where a head gets several, so that their sum is
        rounded once."""
        dtypes = [tensor.dtype for tensor in tensors]
        first_shared = 1 if self.layout.shares_key_values else 3
        dtypes[first_shared:] = [sum_dtype(dtype) for dtype in dtypes[first_shared:]]
        return [torch.zeros_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]

    def scatter_gradients(self, of_group: Sequence[Tensor], head_group: int, grads: Sequence[Tensor]) -> None:
        """Add one group's gradients of query, key, value and sinks to this shard's, which `sums_for` made."""
        assert self.group is not None
        heads = self._heads(head_group)
        received = scatter_sequence(of_group[:3], heads, self.group)
        for parts, tensors in zip(heads, received, strict=True):
            for part, tensor, total in zip(parts, tensors, grads, strict=False):
                total[:, part.start : part.stop] += tensor
        mine = heads[self.group.rank][0]
        for grad, total in zip(of_group[3:], grads[3:], strict=True):
            total[mine.start : mine.stop] += grad

    def _key_value_index(self, head_group: int) -> list[int] | None:
        return None if self.group is None else self.layout.key_value_index(self.group.rank, head_group)

    def _heads(self, head_group: int) -> list[tuple[range, range, range]]:
        """For each rank the heads of query, key and value in the group."""
        layout = self.layout
        key_values = [layout.key_value_heads(rank, head_group) for rank in range(layout.sp_size)]
        return [(layout.query_heads(rank, head_group), kv, kv) for rank, kv in enumerate(key_values)]

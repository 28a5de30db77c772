"""Attention over a sharded sequence as one operator: exchanges, heads in groups, documents, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.attention import Attended, AttentionSpec, CausalAttention
from mst_ds.attention.documents import on_device
from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import HeadLayout
from mst_ds.recompute import Kept, KeptOnDevice, LayerRecompute, RandomState

from .all_to_all import gather_sequence, scatter_sequence
from .groups import SequenceGroup


@dataclass(frozen=True)
class SequenceAttention:
    """What one attention layer computes on this rank.

    Args:
        attention: over whole sequences; what it computes is `spec`.
        group: the sequence group; None where the sequence is not sharded.
        layout: which heads each rank works on, and in how many groups.
    """

    attention: CausalAttention
    spec: AttentionSpec
    group: SequenceGroup | None
    layout: HeadLayout

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None = None,
        *,
        recompute: LayerRecompute | None = None,
    ) -> Tensor:
        """Ulysses attention (arXiv 2309.14509, section 3), heads in groups, one group after another.

        The backward needs the local queries, keys, values and output, and what the kernel keeps for its own backward (a
        log-sum-exp): heads of the whole sequence are alive for one group at a time, in the backward, too. In a layer
        that is computed again attention is not, where its output and that log-sum-exp are kept.

        Args:
            query: (B, N, L, D) of this shard; key: (B, K, L, D); value: (B, K, L, Dv); sinks: (N,).
            recompute: of the model's layers; None where nothing is computed again.

        Returns:
            (B, L, N, Dv).
        """
        tensors = [tensor for tensor in (query, key, value, sinks) if tensor is not None]
        call = None if recompute is None else recompute.call
        memo = _Memo() if call is None else call.note(_Memo)
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
            memo.keep = None
        elif call is None or call.is_recomputing:
            memo.keep = KeptOnDevice
        elif recompute is not None and recompute.keep_attention and self.spec.window is None:
            # With a window attention costs little.
            memo.keep, memo.keeps_output = call.store.keep, True
        output: Tensor = _SequenceAttention.apply(self, memo, *tensors)
        return output

    def attend(self, tensors: Sequence[Tensor]) -> Attended:
        """Over whole sequences: query, key, value and, if there are any, sinks."""
        query, key, value, *sinks = tensors
        return self.attention.forward(query, key, value, self.spec, *sinks)

    def gradients(
        self, kept: _KeptGroup, tensors: Sequence[Tensor], output: Tensor, grad_output: Tensor
    ) -> list[Tensor]:
        """Of each of the tensors of `attend`, of which `kept` is left."""
        query, key, value, *sinks = tensors
        return self.attention.backward(grad_output, query, key, value, kept.take(output), self.spec, *sinks)

    def gathered(self, tensors: Sequence[Tensor], head_group: int) -> list[Tensor]:
        """Query, key, value and sinks of one group of this rank's heads, over the whole sequence."""
        if self.group is None:
            return list(tensors)
        query, key, value = gather_sequence(tensors[:3], self._heads(head_group), self.group)
        index = self.layout.key_value_index(self.group.rank, head_group)
        if index is not None:
            copies = on_device(index, key.device)
            key, value = key[:, copies], value[:, copies]
        heads = self.layout.query_heads(self.group.rank, head_group)
        return [query, key, value, *(sinks[heads.start : heads.stop] for sinks in tensors[3:])]

    def gathered_outputs(self, tensors: Sequence[Tensor], head_group: int) -> Sequence[Tensor]:
        """(B, L, N, D) tensors of this shard -> (B, n, S, D) of one group of this rank's heads."""
        of_heads = [tensor.transpose(1, 2) for tensor in tensors]
        if self.group is None:
            return of_heads
        heads = [(queries,) * len(tensors) for queries, *_ in self._heads(head_group)]
        return gather_sequence(of_heads, heads, self.group)

    def scatter_output(self, of_group: Tensor, head_group: int, output: Tensor) -> None:
        """Put the output of one group of heads, (B, n, S, D), into this shard's, (B, L, N, D)."""
        assert self.group is not None
        heads = [(queries,) for queries, *_ in self._heads(head_group)]
        for (part,), (received,) in zip(heads, scatter_sequence([of_group], heads, self.group), strict=True):
            output[:, :, part.start : part.stop] = received.transpose(1, 2)

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
        heads, (query, key, value) = self._heads(head_group), of_group[:3]
        index = self.layout.key_value_index(self.group.rank, head_group)
        if index is not None:
            key, value = (_summed_by_head(grad, index) for grad in (key, value))
        received = scatter_sequence([query, key, value], heads, self.group)
        for parts, tensors in zip(heads, received, strict=True):
            for part, tensor, total in zip(parts, tensors, grads, strict=False):
                total[:, part.start : part.stop] += tensor
        mine = heads[self.group.rank][0]
        for grad, total in zip(of_group[3:], grads[3:], strict=True):
            total[mine.start : mine.stop] += grad

    def _heads(self, head_group: int) -> list[tuple[range, range, range]]:
        """For each rank the heads of query, key and value in the group."""
        layout = self.layout
        key_values = [layout.key_value_heads(rank, head_group) for rank in range(layout.sp_size)]
        return [(layout.query_heads(rank, head_group), kv, kv) for rank, kv in enumerate(key_values)]


def _summed_by_head(grad: Tensor, index: list[int]) -> Tensor:
    """Gradients of copies of heads -> of the heads, the sum not rounded early."""
    total = grad.new_zeros(grad.shape[0], max(index) + 1, *grad.shape[2:], dtype=sum_dtype(grad.dtype))
    return total.index_add_(1, on_device(index, grad.device), grad.to(total.dtype)).to(grad.dtype)


@dataclass(frozen=True)
class _KeptGroup:
    """Of attention over one group of heads: the log-sum-exp, and what its kernels drew at random."""

    log_sum_exp: Kept
    draws: list[list[Kept]]

    @classmethod
    def of(cls, attended: Attended, keep: Callable[[Tensor], Kept]) -> _KeptGroup:
        return cls(keep(attended.log_sum_exp), [[keep(tensor) for tensor in draw] for draw in attended.draws])

    def take(self, output: Tensor) -> Attended:
        """With the output that it belongs to. To be called once."""
        draws = [tuple(kept.take() for kept in draw) for draw in self.draws]
        return Attended(output, self.log_sum_exp.take(), draws)


class _Memo:
    """What one call of attention leaves for its backward, and for when its layer is computed again.

    Attributes:
        keep: how what kernels keep is kept; None where nothing is differentiated, or all will be computed again.
        keeps_output: whether the output is, too.
        groups: what attention over each group of heads left, beside its output.
    """

    keep: Callable[[Tensor], Kept] | None = None
    keeps_output = False
    groups: list[_KeptGroup] | None = None
    _output: Kept | None = None
    _random_state: RandomState | None = None

    def note_output(self, output: Tensor, *, is_random: bool) -> None:
        if self.keeps_output and self.keep is not None:
            # Not the output itself, which will hold the graph that holds this.
            self._output = self.keep(output.detach())
            self._random_state = RandomState(output.device) if is_random else None

    def take_output(self) -> Tensor | None:
        """The kept output, if there is one; random numbers that attention drew the first time count as drawn."""
        output, self._output = self._output, None
        if output is None:
            return None
        if self._random_state is not None:
            self._random_state.restore()
        return output.take().detach()


class _SequenceAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention: SequenceAttention, memo: _Memo, *tensors: Tensor) -> Tensor:
        ctx.attention, ctx.memo = attention, memo
        output = memo.take_output()
        if output is None:
            output = _forward(attention, memo, tensors)
            memo.note_output(output, is_random=attention.spec.dropout > 0)
        ctx.save_for_backward(*tensors, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # First of all: with recompute, this is what computes the layer again, and with it what is kept of attention.
        *tensors, output = ctx.saved_tensors
        attention, groups, ctx.memo.groups = ctx.attention, ctx.memo.groups, None
        if groups is None:
            raise RuntimeError("attention cannot be differentiated a second time: compute the loss again")
        if attention.group is None:
            of_output = attention.gathered_outputs([output, grad_output], 0)
            grads = attention.gradients(groups[0], tensors, *of_output)
        else:
            grads = attention.sums_for(tensors)
            for head_group, kept in zip(attention.layout.groups, groups, strict=True):
                gathered = attention.gathered(tensors, head_group)
                of_output = attention.gathered_outputs([output, grad_output], head_group)
                found = attention.gradients(kept, gathered, *of_output)
                del gathered, of_output
                attention.scatter_gradients(found, head_group, grads)
                del found
        return None, None, *(grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True))


def _forward(attention: SequenceAttention, memo: _Memo, tensors: Sequence[Tensor]) -> Tensor:
    query, value = tensors[0], tensors[2]
    batch, heads, length, _ = query.shape
    groups: list[_KeptGroup] = []
    output: Tensor | None = None
    for head_group in attention.layout.groups:
        gathered = attention.gathered(tensors, head_group)
        attended = attention.attend(gathered)
        del gathered
        if memo.keep is not None:
            groups.append(_KeptGroup.of(attended, memo.keep))
        of_group = attended.output
        del attended
        if attention.group is None:
            output = of_group.transpose(1, 2).contiguous()
        else:
            if output is None:
                output = query.new_empty(batch, length, heads, value.shape[3])
            attention.scatter_output(of_group, head_group, output)
        del of_group
    memo.groups = None if memo.keep is None else groups
    assert output is not None
    return output

"""Attention over a sharded sequence, or over one chunk of it, as one operator, and what is kept of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.attention import Attended, AttentionSpec, CausalAttention, KeyBlock
from mst_ds.layer_stream import KeysAreThere, LayerCall, LayerStream, Pass
from mst_ds.minisequence import GradientSum
from mst_ds.recompute import Kept, KeptOnDevice, RandomState
from mst_ds.token_layout import TokenLayout

from .carried_keys import CarriedKeys
from .head_exchange import HeadExchange


@dataclass(frozen=True)
class SequenceAttention:
    """What one attention layer computes on this rank.

    Args:
        attention: over whole sequences; what it computes is `spec`.
        heads: exchanges the shard's heads for those that this rank works on.
        picks: (B, L, k) for each query of this shard the positions of the keys that it sees; None where it sees all.
    """

    attention: CausalAttention
    spec: AttentionSpec
    heads: HeadExchange
    picks: Tensor | None = None

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None = None,
        *,
        stream: LayerStream | None = None,
    ) -> Tensor:
        """Ulysses attention (arXiv 2309.14509, section 3), heads in groups, one group after another.

        The backward needs the local queries, keys, values and output, and what the kernel keeps for its own backward (a
        log-sum-exp): heads of the whole sequence are alive for one group at a time, in the backward, too. In a layer
        that is computed again attention is not, where its output and that log-sum-exp are kept, and with them the keys
        and values that later chunks read.

        Args:
            query: (B, N, L, D) of this shard, or of the chunk that runs; key: (B, K, L, D); value: (B, K, L, Dv);
                sinks: (N,).
            stream: of the model's layers; None where nothing is computed again.

        Returns:
            (B, L, N, Dv).

        Raises:
            KeysAreThere: the chunk runs for its keys and values only.
        """
        tensors = [tensor for tensor in (query, key, value, sinks) if tensor is not None]
        call = None if stream is None else stream.call
        if stream is None or call is None:
            is_differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
            memo = _Memo(KeptOnDevice if is_differentiated else None)
            return self._apply(_Chunk(slice(0, query.shape[2] * self._ranks), memo), tensors)
        carried = call.carry(lambda: self._carried(call))
        chunk = _Chunk(carried.spans[call.chunk], _Memo(), call.chunk, carried)
        if call.runs_for is not Pass.KEYS:
            chunk.memo = call.note(_Memo)
        if call.runs_for is Pass.BACKWARD:
            if carried.needs_keys:
                chunk.memo.keep, chunk.holds_keys = KeptOnDevice, True
            if sinks is not None and call.sums is not None:
                chunk.sinks_sum = call.sums.find(sinks)
            return self._apply(chunk, tensors)
        if call.runs_for is Pass.KEYS:
            chunk.holds_keys = True
            if not call.carries_more:
                for head_group in self.heads.layout.groups:
                    carried.of_groups[head_group].put(chunk.index, *self.heads.gathered_keys(tensors, head_group))
                raise KeysAreThere
            return self._apply(chunk, tensors)
        chunk.holds_keys = not call.is_last
        if call.is_kept and stream.keep_attention and self.spec.window is None:
            # With a window attention costs little.
            carried.needs_keys = False
            chunk.memo.keep, chunk.memo.keeps_output = call.part.keep, True
        output = self._apply(chunk, tensors)
        if not call.is_last:
            self._after_forward(carried, call)
        return output

    def _apply(self, chunk: _Chunk, tensors: Sequence[Tensor]) -> Tensor:
        output: Tensor = _SequenceAttention.apply(self, chunk, *tensors)
        return output

    def _with_all_picks(self, picks: Tensor) -> SequenceAttention:
        """With those of all shards, for the heads of this rank; they are there while attention is computed."""
        group = self.heads.group
        if group is not None:
            picks = TokenLayout(group.size).join(group.all_gather(picks), dim=1)
        return replace(self, attention=replace(self.attention, picks=picks), picks=None)

    @property
    def _ranks(self) -> int:
        return self.heads.layout.sp_size

    def _carried(self, call: LayerCall) -> _Carried:
        # A chunk of all shards is one stretch of the sequence.
        spans = [slice(self._ranks * tokens.start, self._ranks * tokens.stop) for tokens in call.chunks]
        earlier = [self.attention.earlier_keys(span, self.spec) for span in spans]
        by_chunk = self.spec.window is not None
        return _Carried(spans, earlier, [CarriedKeys(spans, by_chunk=by_chunk) for _ in self.heads.layout.groups])

    def _after_forward(self, carried: _Carried, call: LayerCall) -> None:
        """Keep the keys of a chunk, and let go of those that no other reads."""
        for keys in carried.of_groups:
            if not carried.needs_keys:
                keys.keep(call.chunk, call.part)
            keys.forget(carried.earlier[call.chunk + 1])

    def forward(self, chunk: _Chunk, tensors: Sequence[Tensor]) -> Tensor:
        """The output of this shard, (B, L, N, Dv)."""
        if self.picks is not None:
            return self._with_all_picks(self.picks).forward(chunk, tensors)
        groups: list[_KeptGroup] = []
        output: Tensor | None = None
        for head_group in self.heads.layout.groups:
            query, key, value = self._inputs(chunk, tensors, head_group)
            sinks = self.heads.sinks(tensors[3:], head_group)
            # What dropout draws depends on the blocks, which are those of chunks in the backward.
            earlier = self._earlier(chunk, head_group, by_chunk=self.spec.dropout > 0)
            attended = self.attention.forward_chunk(chunk.tokens, query, key, value, earlier, self.spec, *sinks)
            del query, key, value
            if chunk.memo.keep is not None:
                groups.append(_KeptGroup.of(attended, chunk.memo.keep))
            of_group = attended.output
            del attended
            output = self.heads.scatter_output(of_group, head_group, output, tensors[0].shape[1])
            del of_group
        chunk.memo.groups = None if chunk.memo.keep is None else groups
        assert output is not None
        return output

    def backward(
        self, chunk: _Chunk, tensors: Sequence[Tensor], output: Tensor, grad_output: Tensor, groups: list[_KeptGroup]
    ) -> Sequence[Tensor]:
        """The gradients of the tensors that `forward` was given."""
        if self.picks is not None:
            return self._with_all_picks(self.picks).backward(chunk, tensors, output, grad_output, groups)
        grads = [] if self.heads.group is None else self.heads.sums_for(tensors)
        for head_group, kept in zip(self.heads.layout.groups, groups, strict=True):
            gathered = self._inputs(chunk, tensors, head_group)
            of_output, of_grad = self.heads.gathered_outputs([output, grad_output], head_group)
            found = self._gradients(chunk, head_group, gathered, of_grad, kept.take(of_output), tensors[3:])
            del gathered, of_output, of_grad
            if self.heads.group is None:
                return found
            self.heads.scatter_gradients(found, head_group, grads)
            del found
        return grads

    def _gradients(
        self,
        chunk: _Chunk,
        head_group: int,
        gathered: Sequence[Tensor],
        grad_output: Tensor,
        attended: Attended,
        sinks: Sequence[Tensor],
    ) -> list[Tensor]:
        """Of one group's query, key, value and sinks; those of earlier keys are added to theirs."""
        heads = self.heads

        def add(tokens: slice, d_key: Tensor, d_value: Tensor) -> None:
            assert chunk.carried is not None
            of_group = heads.summed(d_key, head_group), heads.summed(d_value, head_group)
            chunk.carried.of_groups[head_group].add(tokens, *of_group)

        query, key, value = gathered
        of_sinks = heads.sinks(sinks, head_group)
        earlier = self._earlier(chunk, head_group, by_chunk=True)
        found = self.attention.backward_chunk(
            chunk.tokens,
            grad_output,
            query,
            key,
            value,
            earlier,
            attended,
            self.spec,
            of_sinks[0] if of_sinks else None,
            add,
        )
        d_key, d_value = (heads.summed(grad, head_group) for grad in found[1:3])
        if chunk.carried is not None:
            keys = chunk.carried.of_groups[head_group]
            d_key, d_value = keys.complete(chunk.index, d_key, d_value)
            keys.end(chunk.index)
        return [found[0], d_key, d_value, *found[3:]]

    def _inputs(self, chunk: _Chunk, tensors: Sequence[Tensor], head_group: int) -> list[Tensor]:
        """Query, key and value of one group, of this chunk of the whole sequence."""
        keys = None if chunk.carried is None else chunk.carried.of_groups[head_group]
        if keys is not None and keys.has(chunk.index):
            (query,), (key, value) = self.heads.gathered(tensors[:1], head_group), keys.of(chunk.index)
        else:
            query, key, value = self.heads.gathered(tensors[:3], head_group)
            if keys is not None and chunk.holds_keys:
                keys.put(chunk.index, key, value)
        return [query, *(self.heads.copied(tensor, head_group) for tensor in (key, value))]

    def _earlier(self, chunk: _Chunk, head_group: int, *, by_chunk: bool) -> Iterator[KeyBlock]:
        if chunk.carried is None:
            return
        keys, heads = chunk.carried.of_groups[head_group], self.heads
        for block in keys.earlier(chunk.carried.earlier[chunk.index], by_chunk=by_chunk):
            yield KeyBlock(block.first, heads.copied(block.key, head_group), heads.copied(block.value, head_group))
            del block  # before the next is asked for


@dataclass
class _Carried:
    """What one attention layer carries from chunk to chunk.

    Attributes:
        spans: of each chunk the tokens of the whole sequence.
        earlier: those before it whose keys it reads.
        of_groups: the keys and values of each group of heads.
        needs_keys: whether they are computed again for the backward, and not kept.
    """

    spans: Sequence[slice]
    earlier: Sequence[slice]
    of_groups: Sequence[CarriedKeys]
    needs_keys: bool = True

    def missing_keys(self, chunk: int) -> list[int]:
        return self.of_groups[0].missing(self.earlier[chunk]) if self.needs_keys else []

    def end_forward(self) -> None:
        for keys in self.of_groups:
            keys.drop()


@dataclass
class _Chunk:
    """A chunk that attention is called for, or a whole sequence.

    Attributes:
        tokens: of the whole sequence.
        memo: what this call leaves for its backward, and for when its layer is computed again.
        index, carried: of the stream; None where nothing is computed again.
        holds_keys: whether its keys and values will be read again.
        sinks_sum: over the chunks of a layer.
    """

    tokens: slice
    memo: _Memo
    index: int = 0
    carried: _Carried | None = None
    holds_keys: bool = False
    sinks_sum: GradientSum | None = None


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


@dataclass
class _Memo:
    """What one call of attention leaves for its backward, and for when its layer is computed again.

    Attributes:
        keep: how what kernels keep is kept; None where nothing is differentiated, or all will be computed again.
        keeps_output: whether the output is, too.
        groups: what attention over each group of heads left, beside its output.
    """

    keep: Callable[[Tensor], Kept] | None = None
    keeps_output: bool = False
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
    def forward(ctx: Any, attention: SequenceAttention, chunk: _Chunk, *tensors: Tensor) -> Tensor:
        ctx.attention, ctx.chunk = attention, chunk
        output = chunk.memo.take_output()
        if output is None:
            output = attention.forward(chunk, tensors)
            chunk.memo.note_output(output, is_random=attention.spec.dropout > 0)
        ctx.save_for_backward(*tensors, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, output = ctx.saved_tensors
        chunk = ctx.chunk
        groups, chunk.memo.groups = chunk.memo.groups, None
        if groups is None:
            raise RuntimeError("attention cannot be differentiated a second time: compute the loss again")
        grads = list(ctx.attention.backward(chunk, tensors, output, grad_output, groups))
        if chunk.sinks_sum is not None:
            chunk.sinks_sum.add(grads[3])
            grads[3] = None
        return (
            None,
            None,
            *(None if grad is None else grad.to(tensor.dtype) for grad, tensor in zip(grads, tensors, strict=True)),
        )

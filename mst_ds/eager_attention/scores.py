"""Attention's scores and weights that are not computed: what a model does between its two products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mst_ds.attention import Mask
from mst_ds.sequence_parallel import ulysses_attention

from .alibi import is_linear, slopes_of, with_slopes
from .lazy import Lazy, ModuleCall, Pattern, dtype_of_call, narrower

# What models write in the place of minus infinity is this, times a scale, at most: its softmax is 0 in any dtype.
_HIDING = -1e4
_LEAST_HIDDEN = -1e3


@dataclass(frozen=True)
class Written:
    """What a model has written so far.

    Args:
        query: (B, N, L, D); key: (B, K, L, D); the scores are `scaling` times their products.
        slopes: (N,) or (1,), of what is added for each position of a key; None for nothing.
        hidden: the score of a hidden key; None where none is.
        mask: what is hidden beside what is to come.
        is_softmax: whether these are weights, of which `dropout` are dropped.
    """

    query: Tensor
    key: Tensor
    scaling: float = 1.0
    slopes: Tensor | None = None
    hidden: float | None = None
    mask: Mask | None = None
    is_softmax: bool = False
    dropout: float = 0.0


class LazyScores(Lazy):
    """(B, N, L, L) or (B * N, L, L), of a module's call."""

    written: Written
    knows_others = True

    @classmethod
    def of_product(cls, call: ModuleCall, query: Tensor, key: Tensor, dtype: torch.dtype) -> LazyScores:
        """Args:
        query: (B, N, L, D) or (B * N, L, D); key: (B, K, L, D), or (B * N, L, D).
        """
        shape = *query.shape[:-1], key.shape[-2]
        made: LazyScores = cls(call, shape, dtype, query.device)
        made.written = Written(by_heads(query, call), by_heads(key, call))
        return made

    @classmethod
    def operations(cls) -> Mapping[str, Callable[..., Any]]:
        return _ON_SCORES

    def then(self, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None, **changes: Any) -> LazyScores:
        """After a further operation."""
        made: LazyScores = type(self)(self.call, shape or self.shape, dtype or self.dtype, self.device)
        made.written = replace(self.written, **changes)
        return made

    def scaled(self, factor: float) -> LazyScores:
        """Times a number."""
        if self.written.is_softmax:
            self.call.refuse("multiplies its attention's weights")
        written = self.written
        return self.then(
            scaling=written.scaling * factor,
            slopes=None if written.slopes is None else written.slopes * factor,
            hidden=None if written.hidden is None else written.hidden * factor,
        )

    def hiding(self, value: float, mask: Mask | None) -> LazyScores:
        """With a score of `value` for each key that is to come, or that `mask` hides."""
        before = self.written
        if before.is_softmax or not value <= _HIDING:
            self.call.refuse(f"hides keys by {value} in its attention's {'weights' if before.is_softmax else 'scores'}")
        hidden = value if before.hidden is None else min(value, before.hidden)
        return self.then(hidden=hidden, mask=narrower(before.mask, mask, self.call))

    def biased(self, bias: Tensor, factor: float = 1.0) -> LazyScores:
        """With `factor` times a tensor added that has one element for each key, or for all of them."""
        call = self.call
        if self.written.is_softmax or bias.requires_grad or bias.dim() > self.dim():
            call.refuse("adds a tensor to its attention's weights, or learns what it adds to its scores")
        if bias.dim() == 0 or bias.shape[-1] == 1 or bias.stride(-1) == 0:
            return self.then()  # the same for all keys of a query, as softmax does not see
        if bias.dim() < 2 or bias.shape[-2] != 1:
            call.refuse("adds a tensor of all tokens to all to its attention's scores")
        of_keys = by_heads(bias if bias.is_floating_point() else bias.to(self.dtype), call, self.dim())[:, :, 0]
        if not call.ask(bias, lambda: is_linear(of_keys), unknown=True):
            call.refuse("adds a tensor to its attention's scores that does not grow with the position of keys alone")
        slopes = slopes_of(of_keys) * factor
        if call.ask(bias, lambda: not bool(slopes.any()), unknown=False):
            return self.then()
        return self.then(slopes=slopes if self.written.slopes is None else self.written.slopes + slopes)

    def attended(self, value: Tensor) -> Tensor:
        """(B, N, L, Dv) or (B * N, L, Dv): the weights times (B, K, L, Dv) or (B * N, L, Dv)."""
        call, written = self.call, self.written
        if not written.is_softmax:
            call.refuse("multiplies values by scores without a softmax")
        call.attended += 1
        if value.is_meta:  # a model that is only looked at
            return value.new_empty(*self.shape[:-1], value.shape[-1])
        values = by_heads(value, call)
        dtype, device = value.dtype, value.device.type
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        # Products are often taken in fp32, of what had 16 bits before: kernels sum them so anyway.
        query, key = (x.to(dtype) for x in (written.query, written.key))
        if written.slopes is not None:
            slopes = written.slopes.expand(query.shape[1])
            query, key = with_slopes(query, key, slopes, self._positions(), written.scaling)
        output, _ = ulysses_attention(
            call.module,
            query,
            key,
            values.to(dtype),
            written.mask,
            dropout=written.dropout,
            scaling=written.scaling,
            ulysses=call.context,
        )
        of_heads = output.transpose(1, 2)
        return of_heads if value.dim() == 4 else of_heads.flatten(0, 1)

    def _positions(self) -> Tensor:
        """(B, L) or (1, L), of this call's tokens."""
        positions = self.call.context.positions
        assert positions is not None, "the decoder's forward says where its tokens stand"
        return positions[:, self.call.tokens]


def by_heads(tensor: Tensor, call: ModuleCall, dims: int = 3) -> Tensor:
    """(B, N, T, D), or what is broadcast to it, of (B * N, T, D).

    Args:
        dims: of the scores; a tensor of fewer dimensions than 4 is broadcast to those of 4.
    """
    if tensor.dim() == 4:
        return tensor
    if dims == 4 or tensor.dim() < 3 or tensor.shape[0] == 1:
        return tensor[(None,) * (4 - tensor.dim())]
    return tensor.unflatten(0, (call.batch, -1))


def _divided(scores: Any, by: Any) -> LazyScores:
    if not isinstance(scores, LazyScores) or not isinstance(by, int | float):
        (scores if isinstance(scores, LazyScores) else by).call.refuse("divides its attention's scores by a tensor")
    return scores.scaled(1 / by)


def _multiplied(first: Any, second: Any) -> LazyScores:
    scores, other = (first, second) if isinstance(first, LazyScores) else (second, first)
    if isinstance(other, int | float):
        return scores.scaled(other)
    is_mask = isinstance(other, Pattern) and (other.seen, other.hidden) == (1, 0)
    if not is_mask or scores.written.hidden is not None or scores.written.is_softmax:
        scores.call.refuse("multiplies its attention's scores by a tensor")
    # Scores of 0 are not hidden yet, and must be by what is added.
    return scores.then(hidden=0.0, mask=narrower(scores.written.mask, other.mask, scores.call))


def _added(first: Any, second: Any, *, alpha: float = 1) -> LazyScores:
    scores, other = (first, second) if isinstance(first, LazyScores) else (second, first)
    if alpha != 1:
        scores.call.refuse("adds to its attention's scores with a factor")
    if isinstance(other, Pattern):
        if other.seen != 0:
            scores.call.refuse("adds to all of its attention's scores")
        return scores.hiding(other.hidden, other.mask)
    if scores.written.is_softmax:
        scores.call.refuse("adds to its attention's weights")
    # A number is the same for all keys.
    return scores.biased(other) if isinstance(other, Tensor) else scores.then()


def _where(condition: Any, first: Any, second: Any) -> LazyScores:
    scores, value = (first, second) if isinstance(first, LazyScores) else (second, first)
    is_seen = isinstance(first, LazyScores)
    known = isinstance(condition, Pattern) and (condition.seen, condition.hidden) == (is_seen, not is_seen)
    if not known:
        scores.call.refuse("hides keys by a mask of its own")
    return scores.hiding(_number(value, scores.call), condition.mask)


def _mask_filled(scores: Any, mask: Any, value: Any) -> LazyScores:
    if not isinstance(scores, LazyScores):
        mask.call.refuse("fills a tensor by its causal mask")
    return _where(mask, value, scores)


def _at_least(scores: LazyScores, other: Any) -> LazyScores:
    """The lowest of a dtype in the place of minus infinity."""
    if not isinstance(other, Tensor) or other.dim() or scores.written.is_softmax:
        scores.call.refuse("takes a maximum of its attention's scores")
    return scores.hiding(max(_number(other, scores.call), torch.finfo(torch.float64).min), scores.written.mask)


def _number(value: Any, call: ModuleCall) -> float:
    if isinstance(value, Tensor):
        if value.dim():
            call.refuse("hides keys by a tensor of scores")
        return call.ask(value, lambda: float(value), unknown=float("-inf"))
    return float(value)


def _softmax(
    scores: LazyScores, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> LazyScores:
    if dim not in (-1, scores.dim() - 1) or scores.written.is_softmax:
        scores.call.refuse("takes a softmax over something else than the keys")
    hidden = scores.written.hidden
    if hidden is None or hidden > _LEAST_HIDDEN:
        scores.call.refuse("does not hide the keys that are to come")
    return scores.then(dtype=dtype, is_softmax=True)


def _softmax_of_torch(scores: LazyScores, dim: int, dtype: torch.dtype | None = None) -> LazyScores:
    return _softmax(scores, dim, dtype=dtype)


def _dropped(scores: LazyScores, p: float = 0.5, training: bool = True, inplace: bool = False) -> LazyScores:
    if not training or not p:
        return scores.then()
    if not scores.written.is_softmax or scores.written.dropout:
        scores.call.refuse("drops elements of its attention's scores, or twice of its weights")
    return scores.then(dropout=p)


def _viewed(scores: LazyScores, *shape: Any) -> LazyScores:
    sizes = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = -math.prod(scores.shape) // math.prod(sizes)
    call, heads = scores.call, scores.written.query.shape[1]
    matrix = list(scores.shape[-2:])
    if sizes not in ([call.batch, heads, *matrix], [call.batch * heads, *matrix]):
        call.refuse(f"views its attention's scores as {sizes}")
    return scores.then(shape=sizes)


def _converted(scores: LazyScores, *args: Any, **kwargs: Any) -> LazyScores:
    return scores.then(dtype=dtype_of_call(*args, **kwargs))


def _detached(scores: LazyScores) -> LazyScores:
    """Within an autograd function, such as ZeRO-3's around a module that only drops elements; a model's own would leave
    queries and keys without gradients."""
    if torch.is_grad_enabled():
        scores.call.refuse("detaches its attention's scores or weights")
    return scores.then()


def _product(first: Any, second: Any) -> Tensor:
    if not isinstance(first, LazyScores) or isinstance(second, Lazy):
        (first if isinstance(first, Lazy) else second).call.refuse("multiplies a tensor by its attention's scores")
    return first.attended(second)


_ON_SCORES: Mapping[str, Callable[..., Any]] = {
    "add": _added,
    "bfloat16": lambda scores: scores.then(dtype=torch.bfloat16),
    "bmm": _product,
    "detach": _detached,
    "div": _divided,
    "dropout": _dropped,
    "float": lambda scores: scores.then(dtype=torch.float32),
    "half": lambda scores: scores.then(dtype=torch.float16),
    "masked_fill": _mask_filled,
    "matmul": _product,
    "max": _at_least,
    "maximum": _at_least,
    "mul": _multiplied,
    "radd": _added,
    "reshape": _viewed,
    "rmul": _multiplied,
    "softmax": _softmax,
    "to": _converted,
    "truediv": _divided,
    "type_as": _converted,
    "view": _viewed,
    "where": _where,
}

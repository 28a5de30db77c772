"""A module's own forward, whose attention this project computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mst_ds.attention import SlidingWindow
from mst_ds.sequence_parallel import UlyssesContext

from .lazy import ModuleCall, Pattern, name_of, window_of
from .masks import EagerMask
from .scores import LazyScores


@dataclass(frozen=True)
class EagerAttention:
    """A module whose forward writes attention out: queries times keys, a mask, a softmax, times values."""

    module: nn.Module
    _facts: list[Any] = field(default_factory=list, repr=False, compare=False)

    def run(
        self, forward: Callable[..., Any], context: UlyssesContext, tokens: slice | None, *args: Any, **kwargs: Any
    ) -> Any:
        """What `forward` gives, without attention's weights, which nobody computes.

        Args:
            forward: of the module.
            tokens: of this shard, of a chunk that runs; None for all.
            args, kwargs: of the forward; the hidden states, (B, L, ...), are the first tensor among them.

        Raises:
            NotUnderstood: it does something with its scores that is not understood, or attends to nothing that is.
        """
        leaves, spec = tree_flatten((args, kwargs))
        place = next(index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
        # A chunk of several rows has gaps, and some models view their hidden states (GPT).
        hidden_states = leaves[place] = leaves[place].contiguous()
        batch, length = hidden_states.shape[:2]
        call = ModuleCall(self.module, context, batch, length, tokens or slice(0, length), self._facts)
        leaves = [_as_pattern(leaf, call, hidden_states) if isinstance(leaf, EagerMask) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        with _Products(call):
            given = forward(*args, **kwargs)
        if not call.attended:
            call.refuse("attends in another way than by products and a softmax")
        return tree_map(lambda leaf: None if isinstance(leaf, LazyScores) else leaf, given)


class _Products(TorchFunctionMode):
    """Within, a product of all tokens with all is not computed, nor a part of a causal mask cut out."""

    def __init__(self, call: ModuleCall) -> None:
        super().__init__()
        self._call = call
        self._buffers = [buffer for buffer in call.module.buffers() if _is_square(buffer)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not any(issubclass(each, LazyScores) for each in types):
            taken_over = _TAKEN_OVER.get(name_of(func))
            found = None if taken_over is None else taken_over(self, *args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)

    def product(self, first: Any, second: Any) -> LazyScores | None:
        """Of queries (..., L, D) with keys (..., D, L)."""
        length = self._call.length
        if min(first.dim(), second.dim()) < 3 or (first.shape[-2], second.shape[-1]) != (length, length):
            return None
        return LazyScores.of_product(self._call, first, second.transpose(-1, -2), first.dtype)

    def product_and_sum(
        self, bias: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1
    ) -> LazyScores | None:
        """alpha times that product, with beta times something else."""
        scores = self.product(batch1, batch2)
        return None if scores is None else scores.scaled(alpha).biased(bias, beta)

    def zeros(self, *size: Any, **kwargs: Any) -> Tensor | None:
        """What a product is added to: one element for all."""
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        is_of_all = len(shape) > 2 and tuple(shape[-2:]) == (self._call.length,) * 2
        return torch.zeros((), **kwargs).expand(*shape) if is_of_all else None

    def part(self, tensor: Any, index: Any) -> Pattern | None:
        """What a buffer of the module says of L tokens: they are causal, wherever they stand."""
        if not any(tensor is buffer for buffer in self._buffers):
            return None
        call = self._call
        of_both = index[-2:] if isinstance(index, tuple) else ()
        ranges = [range(tensor.shape[-1])[each] for each in of_both if isinstance(each, slice)]
        if ranges != [range(call.length)] * 2:
            return None
        window = call.ask(tensor, lambda: self._window(tensor), unknown=0)
        shape = tensor.new_empty(tensor.shape, device="meta")[index].shape
        values = (True, False) if tensor.dtype == torch.bool else (1, 0)
        mask = SlidingWindow(window) if window else None
        return Pattern.of(call, values, mask, shape=shape, dtype=tensor.dtype, device=tensor.device)

    def _window(self, buffer: Tensor) -> int:
        window = window_of(buffer)
        return self._call.refuse("hides keys by a mask of its own") if window is None else window

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """What torch has in one function."""
        product = self.product(query, key.transpose(-1, -2))
        if product is None:
            return None
        scores: Tensor = product.scaled(query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores + _as_pattern(EagerMask(None), self._call, query)
        if attn_mask is not None:
            is_boolean = attn_mask.dtype == torch.bool
            scores = torch.where(attn_mask, scores, float("-inf")) if is_boolean else scores + attn_mask
        weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropout_p)
        return torch.matmul(weights, value)


_TAKEN_OVER: dict[str, Callable[..., Any]] = {
    "baddbmm": _Products.product_and_sum,
    "bmm": _Products.product,
    "getitem": _Products.part,
    "matmul": _Products.product,
    "scaled_dot_product_attention": _Products.attention,
    "zeros": _Products.zeros,
}


def _is_square(buffer: Tensor) -> bool:
    """(..., n, n), of one matrix."""
    return buffer.dim() > 1 and buffer.shape[-1] == buffer.shape[-2] > 1 and buffer.numel() == buffer.shape[-1] ** 2


def _as_pattern(mask: EagerMask, call: ModuleCall, hidden_states: Tensor) -> Pattern:
    """(B, 1, L, L), as transformers has it for eager attention."""
    shape, device = (call.batch, 1, call.length, call.length), hidden_states.device
    values, dtype = ((False, True), torch.bool) if mask.is_boolean else ((0.0, float("-inf")), hidden_states.dtype)
    return Pattern.of(call, values, mask.mask, shape=shape, dtype=dtype, device=device)

"""Chunked RMSNorm: no fp32 copy of the shard is ever alive, and only the norm's input is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import ceil_divide, chunk_slices

from . import fused
from .chunks import GradientSum, ParameterSums, flat, flat_view, require_gathered, rounded_own
from .tokenwise import compute_in_chunks


def chunked_rms_norm(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    function: Callable[[Tensor], Tensor],
    epsilon: float,
    offset: float,
    keeps_dtype: bool,
    chunks: int,
    sums: ParameterSums | None = None,
) -> Tensor:
    """RMSNorm (arXiv 1910.07467, equation 4), `x / sqrt(mean(x^2) + epsilon) * (weight + offset)`, in chunks of tokens.

    The forward is the model's own, chunk by chunk, and keeps its input only; the backward is in fp32 at least, and the
    weight's gradient is rounded once. Where a fused kernel takes 16 bits, both are one kernel over all tokens, and the
    output is rounded once, too.

    Args:
        hidden_states: (..., H).
        weight: (H,).
        function: the model's forward, which computes the above, in its own order of roundings.
        offset: 1 where the model's weight is counted from 1, as in Gemma.
        keeps_dtype: `function` returns the dtype of input and weight where these are of one, of 16 bits; otherwise no
            fused kernel is taken.
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.
        sums: as `chunked_mlp` has them.

    Returns:
        (..., H), in the dtype of `function`'s result.

    Raises:
        ValueError: `weight` is one that ZeRO-3 has not gathered.
    """
    require_gathered("a norm's weight", weight)
    (given,), (left,) = ParameterSums.take(sums, [weight], [hidden_states])
    call = _NormCall(function, epsilon, offset, keeps_dtype, chunks, given)
    order = _memory_order(hidden_states)
    is_turned = order != sorted(order)
    x = hidden_states.permute(order) if is_turned else hidden_states
    output: Tensor = _ChunkedRMSNorm.apply(call, x, left)
    return output.permute([order.index(dim) for dim in range(len(order))]) if is_turned else output


def _memory_order(tensor: Tensor) -> list[int]:
    """The dimensions as they lie in memory, the last one last: of heads, which models norm transposed, no copy is made
    to have tokens in rows."""
    *leading, last = range(tensor.dim())
    return [*sorted(leading, key=tensor.stride, reverse=True), last]


class _NormCall(NamedTuple):
    function: Callable[[Tensor], Tensor]
    epsilon: float
    offset: float
    keeps_dtype: bool
    chunks: int
    given_sum: GradientSum | None

    def is_fused(self, *tensors: Tensor) -> bool:
        return self.keeps_dtype and tensors[0].shape[-1] <= fused.WIDEST_NORM and fused.runs(*tensors)


class _ChunkedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _NormCall, hidden_states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states, weight)
        ctx.call = call
        if call.is_fused(hidden_states, weight):
            return _fused_forward(call, hidden_states, weight)
        return compute_in_chunks(call.function, [hidden_states], call.chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _NormCall = ctx.call
        hidden_states, weight = ctx.saved_tensors
        _, needs_x, needs_weight = ctx.needs_input_grad
        x, dy = flat(hidden_states), flat(grad_output)
        # Not a view, whose base would hold memory that the next backward may write to if it has it alone.
        d_input = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if needs_x else None
        dx = None if d_input is None else flat_view(d_input)
        d_weight = call.given_sum or GradientSum(weight, needs_weight)
        differentiate = _fused_backward if call.is_fused(x, weight, dy) else _backward
        differentiate(call, x, weight, dy, dx, d_weight)
        return None, d_input, *rounded_own([d_weight], [call.given_sum])


def _backward(call: _NormCall, x: Tensor, weight: Tensor, dy: Tensor, dx: Tensor | None, d_weight: GradientSum) -> None:
    """Write the input's gradient and add to the weight's."""
    dtype = sum_dtype(x.dtype)
    scale = weight.to(dtype) + call.offset
    for rows in chunk_slices(x.shape[0], call.chunks):
        wide, grad = x[rows].to(dtype), dy[rows].to(dtype)
        factor = (wide.square().mean(-1, keepdim=True) + call.epsilon).rsqrt()
        normalised = wide * factor
        products = grad * normalised
        d_weight.add_column_sums(products)
        if dx is not None:
            # d/dx of x * factor: what is along x itself is lost, because the length of x does not matter.
            along = torch.mv(products, scale).div_(x.shape[-1]).unsqueeze(-1)
            torch.mul(grad, scale, out=products).addcmul_(normalised, along, value=-1)
            torch.mul(products, factor, out=dx[rows])  # rounded once, where x has 16 bits
        # Not beside the next chunk's.
        del wide, grad, normalised, products


def _with_rows(tensor: Tensor) -> Tensor:
    """(T, C) in contiguous rows."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _fused_forward(call: _NormCall, hidden_states: Tensor, weight: Tensor) -> Tensor:
    from .fused import norm

    output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    norm.forward(_with_rows(flat(hidden_states)), weight, flat_view(output), call.epsilon, call.offset)
    return output


def _fused_backward(
    call: _NormCall, x: Tensor, weight: Tensor, dy: Tensor, dx: Tensor | None, d_weight: GradientSum
) -> None:
    from .fused import norm

    x, dy = _with_rows(x), _with_rows(dy)
    for rows in chunk_slices(len(x), ceil_divide(x.numel(), norm.ELEMENTS_AT_ONCE)):
        part, grad = x[rows], dy[rows]
        parts = (
            x.new_empty(norm.num_parts(*part.shape), x.shape[1], dtype=torch.float32) if d_weight.is_needed else None
        )
        norm.backward(part, weight, grad, dx[rows] if dx is not None else None, parts, call.epsilon, call.offset)
        if parts is not None:
            d_weight.add_column_sums(parts)

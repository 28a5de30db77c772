"""Chunked RMSNorm: no fp32 copy of the shard is ever alive, and only the norm's input is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import chunk_slices

from .chunks import GradientSum, flat, require_gathered
from .tokenwise import compute_in_chunks


def chunked_rms_norm(
    hidden_states: Tensor,
    weight: Tensor,
    *,
    function: Callable[[Tensor], Tensor],
    epsilon: float,
    offset: float,
    chunks: int,
) -> Tensor:
    """RMSNorm (arXiv 1910.07467, equation 4), `x / sqrt(mean(x^2) + epsilon) * (weight + offset)`, in chunks of tokens.

    The forward is the model's own, chunk by chunk, and keeps its input only; the backward is in fp32 at least, and the
    weight's gradient is rounded once.

    Args:
        hidden_states: (..., H).
        weight: (H,).
        function: the model's forward, which computes the above, in its own order of roundings.
        offset: 1 where the model's weight is counted from 1, as in Gemma.
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.

    Returns:
        (..., H), in the dtype of `function`'s result.

    Raises:
        ValueError: `weight` is one that ZeRO-3 has not gathered.
    """
    require_gathered("a norm's weight", weight)
    output: Tensor = _ChunkedRMSNorm.apply(_NormCall(function, epsilon, offset, chunks), hidden_states, weight)
    return output


class _NormCall(NamedTuple):
    function: Callable[[Tensor], Tensor]
    epsilon: float
    offset: float
    chunks: int


class _ChunkedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _NormCall, hidden_states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_states, weight)
        ctx.call = call
        return compute_in_chunks(call.function, [hidden_states], call.chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _NormCall = ctx.call
        hidden_states, weight = ctx.saved_tensors
        _, needs_x, needs_weight = ctx.needs_input_grad
        x, dy = flat(hidden_states), flat(grad_output)
        dtype = sum_dtype(x.dtype)
        scale = weight.to(dtype) + call.offset
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        d_weight = GradientSum(weight, needs_weight)
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
        return None, dx.view(hidden_states.shape) if dx is not None else None, d_weight.rounded()

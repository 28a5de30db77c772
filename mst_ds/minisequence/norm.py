"""Chunked RMSNorm: no fp32 copy of the shard is ever alive, and only the norm's input is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import chunk_slices

from .chunks import require_gathered, zeros_for_accumulation
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
    output: Tensor = _ChunkedRMSNorm.apply(function, epsilon, offset, chunks, hidden_states, weight)
    return output


class _ChunkedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor], Tensor],
        epsilon: float,
        offset: float,
        chunks: int,
        hidden_states: Tensor,
        weight: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden_states, weight)
        ctx.epsilon, ctx.offset, ctx.chunks = epsilon, offset, chunks
        return compute_in_chunks(function, [hidden_states], chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad[4:]
        x, dy = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden_states, grad_output))
        dtype = sum_dtype(x.dtype)
        scale = weight.to(dtype) + ctx.offset
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        d_weight = zeros_for_accumulation(weight) if needs_weight else None
        for rows in chunk_slices(x.shape[0], ctx.chunks):
            wide, grad = x[rows].to(dtype), dy[rows].to(dtype)
            factor = (wide.square().mean(-1, keepdim=True) + ctx.epsilon).rsqrt()
            normalised = wide * factor
            products = grad * normalised
            if d_weight is not None:
                d_weight += products.sum(0)
            if dx is not None:
                # d/dx of x * factor: what is along x itself is lost, because the length of x does not matter.
                along = torch.mv(products, scale).div_(x.shape[-1]).unsqueeze(-1)
                torch.mul(grad, scale, out=products).addcmul_(normalised, along, value=-1)
                torch.mul(products, factor, out=dx[rows])  # rounded once, where x has 16 bits
            # Not beside the next chunk's.
            del wide, grad, normalised, products
        return (
            *(None,) * 4,
            dx.view(hidden_states.shape) if dx is not None else None,
            d_weight.to(weight.dtype) if d_weight is not None else None,
        )

"""Rotary embedding without copies of its input: what it needs beside its output is a part of a chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.geometry import chunk_slices

from . import fused
from .chunks import chunks_in_cache


def rotary_embedding(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x * cos + rotate_half(x) * sin` (RoFormer, arXiv 2104.09864, section 3.4.2, with halves in place of pairs), in
    chunks of tokens.

    Rounded as the plain formula is, or once, where a fused kernel takes 16 bits. The backward needs `cos` and `sin`
    only.

    Args:
        heads: (B, N, L, D), of queries or of keys.
        cos, sin: (B, L, R) or (1, L, R), R even and at most D; dimensions from R on stay as they are.

    Returns:
        (B, N, L, D), laid out like `heads`, in the dtype that the plain formula gives.
    """
    output: Tensor = _RotaryEmbedding.apply(heads, cos, sin)
    return output


class _RotaryEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = heads.dtype
        if fused.runs(heads, cos, sin):
            return _fused(heads, cos, sin, is_backward=False)
        half = cos.shape[-1] // 2
        # rotate_half swaps the halves, and turns the sign of the second.
        return _rotated(heads, cos, -sin[..., :half], sin[..., half:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        if fused.runs(grad_output, cos, sin):
            return _fused(grad_output, cos, sin, is_backward=True), None, None
        half = cos.shape[-1] // 2
        return _rotated(grad_output, cos, sin[..., half:], -sin[..., :half]).to(ctx.dtype), None, None


def _rotated(x: Tensor, cos: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`x * cos`, to whose first half the second of `x` is added, times `first`, and to its second the first, times
    `second`."""
    output = torch.empty_like(x, dtype=torch.result_type(x, cos))
    cos, first, second = (factor.unsqueeze(1) for factor in (cos, first, second))
    width = cos.shape[-1]
    half = width // 2
    for rows in chunk_slices(x.shape[2], chunks_in_cache(x)):
        part, into = x[:, :, rows], output[:, :, rows]
        torch.mul(part[..., :width], cos[:, :, rows], out=into[..., :width])
        into[..., :half] += part[..., half:width] * first[:, :, rows]
        into[..., half:width] += part[..., :half] * second[:, :, rows]
        if width < x.shape[3]:
            into[..., width:] = part[..., width:]
    return output


def _fused(x: Tensor, cos: Tensor, sin: Tensor, *, is_backward: bool) -> Tensor:
    from .fused import rotary

    x = x if x.stride(3) == 1 else x.contiguous()
    output = torch.empty_like(x)
    rotary.rotate(x, cos.contiguous(), sin.contiguous(), output, is_backward)
    width = cos.shape[-1]
    if width < x.shape[3]:
        output[..., width:] = x[..., width:]
    return output

"""Chunked LM head + cross-entropy: the logits of one chunk are all the logits that are ever alive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import (
    accumulation_dtype,
    add_column_sums,
    add_outer_products,
    autocast_disabled,
    cast_for_autocast,
    chunk_slices,
    require_gathered,
    zeros_for_accumulation,
)


def chunked_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunks: int,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: int | float | Tensor | None = None,
) -> Tensor:
    """Cross-entropy of `hidden_states @ weight.T + bias` against `labels`, worked through in chunks of tokens.

    The LM-head half of MsT (arXiv 2407.15892, section 3.2). Where gradients are enabled the forward computes them from
    each chunk's logits, which are then dropped; the backward only scales them by the incoming gradient. Under
    `no_grad`, and for inputs that need no gradient, none is computed. Head gradients are summed over chunks in fp32.

    Args:
        hidden_states: (..., H), the decoder's last hidden states.
        weight: (V, H), the LM head.
        labels: (...), integers; `labels[t]` is the target of `hidden_states[t]`, that is, already shifted.
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.
        bias: (V,) or None.
        ignore_index: tokens with this label add nothing.
        num_items_in_batch: what the sum over valid tokens is divided by; None means their number, giving the mean.
            Pass the count of the whole optimizer step for one token, one weight, over ranks and micro-batches.

    Returns:
        A scalar in fp32 (fp64 for fp64 input). Without a valid token it is 0, never NaN.

    Raises:
        ValueError: `chunks` below 1, labels of another shape, or a weight that ZeRO-3 has not gathered.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels must have the shape {tuple(hidden_states.shape[:-1])}, that of hidden_states without its last "
            f"dimension, got {tuple(labels.shape)}"
        )
    require_gathered("the LM head's weight", weight)
    device = hidden_states.device
    labels = labels.to(device).reshape(-1)
    if num_items_in_batch is None:
        num_items_in_batch = (labels != ignore_index).sum()
    num_items = torch.as_tensor(num_items_in_batch, device=device).to(accumulation_dtype(hidden_states.dtype))
    weights = torch.where(num_items > 0, 1 / num_items, torch.zeros_like(num_items))
    tensors = (cast_for_autocast(tensor, device) for tensor in (hidden_states, weight, bias))
    with autocast_disabled(device):
        return _ChunkedLoss.apply(labels, weights, ignore_index, chunks, torch.is_grad_enabled(), *tensors)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        token_weight: Tensor,
        ignore_index: int,
        chunks: int,
        grad_enabled: bool,
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        # needs_input_grad says nothing about no_grad, which is invisible in here.
        needs_x, needs_weight, needs_bias = (grad_enabled and needed for needed in ctx.needs_input_grad[5:])
        dx = torch.empty_like(x) if needs_x else None
        d_weight = zeros_for_accumulation(weight) if needs_weight else None
        d_bias = zeros_for_accumulation(bias) if needs_bias and bias is not None else None
        # 1/n = mantissa * 2^exponent. The mantissa enters here, before gradients are rounded to 16 bits; the exponent
        # in the backward, together with the incoming gradient, mostly a power of two as well. So they are rounded
        # once, and in fp16 nothing underflows before the loss scale arrives.
        mantissa, exponent = torch.frexp(token_weight)
        losses = torch.zeros(x.shape[0], dtype=accumulation_dtype(x.dtype), device=x.device)
        for rows in chunk_slices(x.shape[0], chunks):
            logits = _logits(x[rows], weight, bias)
            losses[rows] = _cross_entropy_(logits, labels[rows], ignore_index)
            if not (needs_x or needs_weight or needs_bias):
                continue
            d_logits = logits.mul_(mantissa)
            rounded = d_logits.to(x.dtype)
            if d_weight is not None:
                # A CUDA GEMM reads 16-bit operands; where it has to be fp32 anyway, the rounding is saved.
                add_outer_products(d_weight, rounded if x.is_cuda else d_logits, x[rows])
            if d_bias is not None:
                add_column_sums(d_bias, d_logits)
            if dx is not None:
                torch.mm(rounded, weight, out=dx[rows])
            # Before the next chunk's: two chunks' logits must never be alive together.
            del logits, d_logits, rounded
        ctx.save_for_backward(dx, d_weight, d_bias, exponent)
        ctx.shape, ctx.dtypes = hidden_states.shape, (weight.dtype, bias.dtype if bias is not None else None)
        # One sum over all tokens, as without chunks: a running total over chunks would round at every step.
        return losses.sum() * token_weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        dx, d_weight, d_bias, exponent = ctx.saved_tensors
        scale = torch.ldexp(grad_output, exponent)
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            *(None,) * 5,
            _scaled(dx, scale, dx.dtype).view(ctx.shape) if dx is not None else None,
            _scaled(d_weight, scale, weight_dtype) if d_weight is not None else None,
            _scaled(d_bias, scale, bias_dtype) if d_bias is not None else None,
        )


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Into a new tensor: what is saved must survive a second backward (retain_graph). `out` avoids an fp32 temporary.
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # One operation: adding the bias afterwards would round 16-bit logits twice.
    logits = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return logits.to(accumulation_dtype(x.dtype))


def _cross_entropy_(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy of each row, (T,), 0 where ignored; `logits` becomes its own gradient, in place.

    Args:
        logits: (T, V) in fp32 or fp64; holds `softmax(logits) - one_hot(labels)` afterwards, 0 in ignored rows.
        labels: (T,).
    """
    ignored = labels == ignore_index
    targets = labels.masked_fill(ignored, 0).unsqueeze(-1)
    logits -= logits.amax(-1, keepdim=True)
    target_logits = logits.gather(-1, targets)
    sums = logits.exp_().sum(-1, keepdim=True)
    losses = (sums.log() - target_logits).squeeze(-1).masked_fill_(ignored, 0)
    logits /= sums
    logits.scatter_add_(-1, targets, torch.full_like(target_logits, -1.0))
    logits.masked_fill_(ignored.unsqueeze(-1), 0)
    return losses

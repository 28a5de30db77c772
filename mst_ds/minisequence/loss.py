"""Chunked LM head + cross-entropy: the logits of one chunk are all the logits that are ever alive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.config import IGNORE_INDEX
from mst_ds.dtypes import sum_dtype

from .chunks import autocast_disabled, cast_for_autocast, flat, gradient_sums, require_gathered
from .heads import Head, HeadCall, LogitTransform


def chunked_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunks: int,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    num_items_in_batch: int | float | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """Cross-entropy of `hidden_states @ weight.T + bias` against `labels`, worked through in chunks of tokens.

    The LM-head half of MsT (arXiv 2407.15892, section 3.2). Where gradients are enabled the forward computes them from
    each chunk's logits, which are then dropped; the backward only scales them by the incoming gradient. Under
    `no_grad`, and for inputs that need no gradient, none is computed. Head gradients are summed over chunks in fp32.
    Logits of 16 bits have no copy in fp32 where a fused kernel takes them, unless they are capped.

    Args:
        hidden_states: (..., H), the decoder's last hidden states.
        weight: (V, H), the LM head.
        labels: (...), integers; `labels[t]` is the target of `hidden_states[t]`, that is, already shifted.
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.
        bias: (V,) or None.
        ignore_index: tokens with this label add nothing.
        num_items_in_batch: what the sum over valid tokens is divided by; None means their number, giving the mean.
            Pass the count of the whole optimizer step for one token, one weight, over ranks and micro-batches.
        logit_scale: the logits are the head's output times this (Cohere, Granite).
        logit_softcap: c, for logits `c * tanh(logits / c)` after the scale (Gemma 2, arXiv 2408.00118, section 2.2).

    Returns:
        A scalar in fp32 (fp64 for fp64 input). Without a valid token it is 0, never NaN.

    Raises:
        ValueError: `chunks` below 1, labels of another shape, or a weight that ZeRO-3 has not gathered.
    """
    require_gathered("the LM head's weight", weight)
    of_head = HeadCall(labels, chunks, ignore_index, LogitTransform(logit_scale, logit_softcap))
    tensors = cast_for_autocast(hidden_states, weight, bias)
    with autocast_disabled(hidden_states.device):
        return _apply(of_head, num_items_in_batch, *tensors)


def chunked_loss_of_head(
    head: Head,
    hidden_states: Tensor,
    parameters: Sequence[Tensor],
    labels: Tensor,
    *,
    chunks: int,
    ignore_index: int = IGNORE_INDEX,
    num_items_in_batch: int | float | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """`chunked_loss` for a head that is more than a weight and a bias, such as one with an adapter.

    The head is differentiated by autograd, chunk by chunk, in the forward; it runs once. Gradients of linear layers are
    summed over chunks in fp32; a chunk's gradient of any other parameter is rounded to its dtype first.

    Args:
        head: (1, T, H) to logits (1, T, V); may draw random numbers.
        parameters: what `head` reads and gradients are wanted for, where they require them.

    The other arguments, the result and the errors are those of `chunked_loss`.
    """
    for parameter in parameters:
        require_gathered("a parameter of the LM head", parameter)
    of_head = HeadCall(labels, chunks, ignore_index, LogitTransform(logit_scale, logit_softcap), head)
    return _apply(of_head, num_items_in_batch, hidden_states, *parameters)


class _LossCall(NamedTuple):
    of_head: HeadCall
    num_items_in_batch: int | float | Tensor | None
    is_grad_enabled: bool


def _apply(
    of_head: HeadCall,
    num_items_in_batch: int | float | Tensor | None,
    hidden_states: Tensor,
    *parameters: Tensor | None,
) -> Tensor:
    call = _LossCall(of_head, num_items_in_batch, torch.is_grad_enabled())
    loss: Tensor = _ChunkedLoss.apply(call, hidden_states, *parameters)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _LossCall, hidden_states: Tensor, *parameters: Tensor | None) -> Tensor:
        x, labels = flat(hidden_states), call.of_head.flat_labels(hidden_states)
        token_weight = _token_weight(call, labels, sum_dtype(x.dtype))
        # needs_input_grad says nothing about no_grad, which is invisible in here.
        _, needs_x, *needs = (call.is_grad_enabled and needed for needed in ctx.needs_input_grad)
        dx = torch.empty_like(x) if needs_x else None
        sums = gradient_sums(parameters, needs)
        # 1/n = mantissa * 2^exponent. The mantissa enters here, before gradients are rounded to 16 bits; the exponent
        # in the backward, together with the incoming gradient, mostly a power of two as well. So they are rounded
        # once, and in fp16 nothing underflows before the loss scale arrives.
        mantissa, exponent = torch.frexp(token_weight)
        losses = call.of_head.run(x, labels, mantissa if needs_x or any(needs) else None, dx, sums)
        ctx.save_for_backward(dx, exponent, *(gradient.total for gradient in sums))
        ctx.shape, ctx.dtypes = hidden_states.shape, [p.dtype if p is not None else None for p in parameters]
        # One sum over all tokens, as without chunks: a running total over chunks would round at every step.
        return losses.sum() * token_weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        dx, exponent, *totals = ctx.saved_tensors
        scale = torch.ldexp(grad_output, exponent)
        return (
            None,
            _scaled(dx, scale, dx.dtype).view(ctx.shape) if dx is not None else None,
            *(
                _scaled(total, scale, dtype) if total is not None else None
                for total, dtype in zip(totals, ctx.dtypes, strict=True)
            ),
        )


def _token_weight(call: _LossCall, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """What a token's loss counts in the mean: 1/n."""
    num_items = call.num_items_in_batch
    if num_items is None:
        num_items = (labels != call.of_head.ignore_index).sum()
    num_items = torch.as_tensor(num_items, device=labels.device).to(dtype)
    return torch.where(num_items > 0, 1 / num_items, torch.zeros_like(num_items))


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Into a new tensor: what is saved must survive a second backward (retain_graph). `out` avoids an fp32 temporary.
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))

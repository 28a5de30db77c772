"""Chunked LM head + cross-entropy: the logits of one chunk are all the logits that are ever alive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.config import IGNORE_INDEX
from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import chunk_slices

from . import fused
from .chunks import (
    GradientSum,
    Linear,
    Scratch,
    autocast_disabled,
    cast_for_autocast,
    flat,
    gradient_sums,
    require_gathered,
    slices_in_cache,
)
from .linear_sums import SumLinearGradients, differentiate

Head = Callable[[Tensor], Tensor]


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
    transform = _LogitTransform(logit_scale, logit_softcap)
    call = _LossCall(labels, chunks, ignore_index, num_items_in_batch, transform, torch.is_grad_enabled())
    tensors = cast_for_autocast(hidden_states, weight, bias)
    with autocast_disabled(hidden_states.device):
        return _apply(call, *tensors)


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
    transform = _LogitTransform(logit_scale, logit_softcap)
    call = _LossCall(labels, chunks, ignore_index, num_items_in_batch, transform, torch.is_grad_enabled(), head)
    return _apply(call, hidden_states, *parameters)


class _LossCall(NamedTuple):
    """head: None where the parameters are a weight and a bias."""

    labels: Tensor
    chunks: int
    ignore_index: int
    num_items_in_batch: int | float | Tensor | None
    transform: _LogitTransform
    is_grad_enabled: bool
    head: Head | None = None

    def begin(
        self, x: Tensor, dx: Tensor | None, sums: Sequence[GradientSum], scratch: Scratch
    ) -> _LinearHead | _CallableHead:
        """A chunk's way through the head, and back: adds to `sums` and writes `dx`."""
        if self.head is not None:
            return _CallableHead(self.head, x, dx, sums, scratch)
        weight, bias = sums
        return _LinearHead(x, dx, weight, bias, scratch)

    def cross_entropy(
        self,
        head: _LinearHead | _CallableHead,
        labels: Tensor,
        factor: Tensor,
        losses: Tensor,
        *,
        needs_gradients: bool,
    ) -> Tensor:
        """Write the losses of a chunk; return `factor` times the gradient of the head's output, if needed, in the
        memory of its logits."""
        if self.transform.softcap is None and fused.runs(head.output):
            from .fused.cross_entropy import cross_entropy_

            logits = head.logits(head.output.dtype)
            cross_entropy_(logits, labels, factor, losses, self.ignore_index, self.transform.scale, needs_gradients)
            return logits
        logits, slope = self.transform(head.logits(sum_dtype(head.output.dtype)), keep_slope=needs_gradients)
        losses.copy_(_cross_entropy_(logits, labels, self.ignore_index, factor))
        return logits if slope is None or not needs_gradients else logits.mul_(slope)


def _apply(call: _LossCall, hidden_states: Tensor, *parameters: Tensor | None) -> Tensor:
    leading = hidden_states.shape[:-1]
    if call.labels.shape != leading:
        raise ValueError(
            f"labels must have the shape {tuple(leading)}, that of hidden_states without its last dimension, got "
            f"{tuple(call.labels.shape)}"
        )
    loss: Tensor = _ChunkedLoss.apply(call, hidden_states, *parameters)
    return loss


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _LossCall, hidden_states: Tensor, *parameters: Tensor | None) -> Tensor:
        x, labels = flat(hidden_states), call.labels.to(hidden_states.device).reshape(-1).contiguous()
        token_weight = _token_weight(call, labels, sum_dtype(x.dtype))
        # needs_input_grad says nothing about no_grad, which is invisible in here.
        _, needs_x, *needs = (call.is_grad_enabled and needed for needed in ctx.needs_input_grad)
        dx = torch.empty_like(x) if needs_x else None
        sums = gradient_sums(parameters, needs)
        # 1/n = mantissa * 2^exponent. The mantissa enters here, before gradients are rounded to 16 bits; the exponent
        # in the backward, together with the incoming gradient, mostly a power of two as well. So they are rounded
        # once, and in fp16 nothing underflows before the loss scale arrives.
        mantissa, exponent = torch.frexp(token_weight)
        losses = torch.zeros(x.shape[0], dtype=sum_dtype(x.dtype), device=x.device)
        needs_gradients = needs_x or any(needs)
        scratch = Scratch()
        for rows in chunk_slices(x.shape[0], call.chunks):
            head = call.begin(x[rows], dx[rows] if dx is not None else None, sums, scratch)
            d_logits = call.cross_entropy(head, labels[rows], mantissa, losses[rows], needs_gradients=needs_gradients)
            if needs_gradients:
                head.add_gradients(d_logits)
            # Before the next chunk's: two chunks' logits must never be alive together.
            del head, d_logits
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
        num_items = (labels != call.ignore_index).sum()
    num_items = torch.as_tensor(num_items, device=labels.device).to(dtype)
    return torch.where(num_items > 0, 1 / num_items, torch.zeros_like(num_items))


class _LinearHead:
    """One chunk through a linear head: its logits, then the gradients that belong to theirs."""

    def __init__(self, x: Tensor, dx: Tensor | None, weight: GradientSum, bias: GradientSum, scratch: Scratch) -> None:
        self.x, self.dx, self.d_weight, self.d_bias, self.scratch = x, dx, weight, bias, scratch
        assert weight.parameter is not None
        self.layer = Linear(weight.parameter, bias.parameter)
        self.output = scratch.empty("output", (len(x), len(weight.parameter)), x.dtype, x.device)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """(T, V), the caller's to write over."""
        output = self.layer.write(self.x, self.output)
        if dtype == output.dtype:
            return output
        return self.scratch.empty("logits", output.shape, dtype, output.device).copy_(output)

    def add_gradients(self, d_logits: Tensor) -> None:
        """Add the parameters' gradients to their sums, write the input's."""
        x = self.x
        rounded = d_logits if d_logits.dtype == x.dtype else self.output.copy_(d_logits)
        # A CUDA GEMM reads 16-bit operands; where it has to be fp32 anyway, the rounding is saved.
        self.d_weight.add_outer_products(rounded if x.is_cuda else d_logits, x)
        self.d_bias.add_column_sums(d_logits)
        if self.dx is not None:
            torch.mm(rounded, self.layer.weight, out=self.dx)


class _CallableHead:
    """One chunk through any head, by autograd."""

    def __init__(self, head: Head, x: Tensor, dx: Tensor | None, sums: Sequence[GradientSum], scratch: Scratch) -> None:
        self.dx, self.sums, self.scratch = dx, sums, scratch
        self.x = x.detach().unsqueeze(0).requires_grad_(dx is not None)
        has_gradient = dx is not None or any(gradient.is_needed for gradient in sums)
        with torch.set_grad_enabled(has_gradient), SumLinearGradients(sums):
            self.output = head(self.x)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """(T, V), the caller's to write over."""
        output = self.output.detach().squeeze(0)
        # A copy in any case: a head may return what autograd needs again, or its own parameter.
        return self.scratch.empty("logits", output.shape, dtype, output.device).copy_(output)

    def add_gradients(self, d_logits: Tensor) -> None:
        """Add the parameters' gradients to their sums, write the input's."""
        d_output = d_logits.to(self.output.dtype).unsqueeze(0)
        differentiate(self.output, d_output, [self.x], [self.dx], self.sums)


class _LogitTransform(NamedTuple):
    """What a model does to its head's output: logits = softcap * tanh(scale * output / softcap), in fp32."""

    scale: float
    softcap: float | None

    def __call__(self, logits: Tensor, *, keep_slope: bool) -> tuple[Tensor, Tensor | float | None]:
        """Write over `logits`; return them and the derivative by the head's output, None where it is 1."""
        if self.scale != 1:
            logits *= self.scale
        if self.softcap is None:
            return logits, self.scale if self.scale != 1 else None
        logits /= self.softcap
        logits.tanh_()
        slope = logits.square().neg_().add_(1).mul_(self.scale) if keep_slope else None
        return logits.mul_(self.softcap), slope


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    # Into a new tensor: what is saved must survive a second backward (retain_graph). `out` avoids an fp32 temporary.
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


def _cross_entropy_(logits: Tensor, labels: Tensor, ignore_index: int, factor: Tensor) -> Tensor:
    """Cross-entropy of each row, (T,), 0 where ignored; `logits` becomes `factor` times its own gradient, in place.

    Args:
        logits: (T, V) in fp32 or fp64; holds `factor * (softmax(logits) - one_hot(labels))` afterwards, 0 in ignored
            rows.
        labels: (T,).
        factor: a scalar.
    """
    losses = torch.empty_like(logits[:, 0])
    # A few rows at a time, which stay in a CPU's cache from one pass over them to the next.
    for rows in slices_in_cache(logits):
        part, valid = logits[rows], labels[rows] != ignore_index
        targets = labels[rows].where(valid, 0).unsqueeze(-1)
        part -= part.amax(-1, keepdim=True)
        target_logits = part.gather(-1, targets)
        sums = part.exp_().sum(-1, keepdim=True)
        losses[rows] = (sums.log() - target_logits).squeeze(-1).where(valid, 0)
        weights = factor * valid.unsqueeze(-1)
        part *= weights / sums
        part.scatter_add_(-1, targets, -weights)
    return losses

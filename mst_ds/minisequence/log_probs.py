"""Chunked LM head + log-probability of each label, for losses that are more than a mean of cross-entropies."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.config import IGNORE_INDEX
from mst_ds.recompute import Conditions

from .chunks import (
    autocast_disabled,
    cast_for_autocast,
    flat,
    forget_casts,
    gradient_sums,
    require_gathered,
)
from .heads import Head, HeadCall, LogitTransform


def chunked_log_probs(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunks: int,
    bias: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The log-probability of each label under the softmax of `hidden_states @ weight.T + bias`, in chunks of tokens.

    The LM-head half of MsT (arXiv 2407.15892, section 3.2) for a loss whose gradient is known only after all tokens are
    seen, as of preferences between sequences. The forward keeps its inputs and no logits; the backward computes each
    chunk's logits again, which is one more product with the head than `chunked_loss` has. Head gradients are summed
    over chunks in fp32. Of a shard it gives what it gives of the whole sequence, since it is per token.

    Args:
        hidden_states: (..., H), the decoder's last hidden states.
        weight: (V, H), the LM head.
        labels: (...), integers; `labels[t]` is the target of `hidden_states[t]`, that is, already shifted.
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.
        bias: (V,) or None.
        ignore_index: tokens with this label have 0, and no gradient.
        logit_scale: the logits are the head's output times this (Cohere, Granite).
        logit_softcap: c, for logits `c * tanh(logits / c)` after the scale (Gemma 2, arXiv 2408.00118, section 2.2).
        temperature: the logits are divided by it last, as for tokens that were sampled so.

    Returns:
        (...), natural logarithms, in fp32 (fp64 for fp64 input). A second derivative is refused.

    Raises:
        ValueError: `chunks` below 1, labels of another shape, a weight that ZeRO-3 has not gathered, or a temperature
            that is not above 0.
    """
    require_gathered("the LM head's weight", weight)
    call = HeadCall(labels, chunks, ignore_index, _transform(logit_scale, logit_softcap, temperature))
    tensors = cast_for_autocast(hidden_states, weight, bias)
    with autocast_disabled(hidden_states.device):
        return _apply(_LogProbsCall(call), *tensors)


def chunked_log_probs_of_head(
    head: Head,
    hidden_states: Tensor,
    parameters: Sequence[Tensor],
    labels: Tensor,
    *,
    chunks: int,
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`chunked_log_probs` for a head that is more than a weight and a bias, such as one with an adapter.

    The backward runs the head again, with the random numbers that the forward drew and under its autocast, and
    differentiates it by autograd, chunk by chunk. Gradients of linear layers are summed over chunks in fp32; a chunk's
    gradient of any other parameter is rounded to its dtype first.

    Args:
        head: (1, T, H) to logits (1, T, V); may draw random numbers.
        parameters: what `head` reads and gradients are wanted for, where they require them.

    The other arguments, the result and the errors are those of `chunked_log_probs`.
    """
    for parameter in parameters:
        require_gathered("a parameter of the LM head", parameter)
    call = HeadCall(labels, chunks, ignore_index, _transform(logit_scale, logit_softcap, temperature), head)
    return _apply(_LogProbsCall(call, tuple(parameters)), hidden_states, *parameters)


def _transform(scale: float, softcap: float | None, temperature: float) -> LogitTransform:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return LogitTransform(scale, softcap, temperature)


class _LogProbsCall(NamedTuple):
    """parameters: of a head that reads them by itself; None where they are a weight and a bias."""

    of_head: HeadCall
    parameters: Sequence[Tensor] | None = None


def _apply(call: _LogProbsCall, hidden_states: Tensor, *parameters: Tensor | None) -> Tensor:
    log_probs: Tensor = _ChunkedLogProbs.apply(call, hidden_states, *parameters)
    return log_probs


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _LogProbsCall, hidden_states: Tensor, *parameters: Tensor | None) -> Tensor:
        labels = call.of_head.flat_labels(hidden_states)
        # Parameters that the head reads by itself are not saved: others would be given back than those it reads.
        ctx.save_for_backward(hidden_states, labels, *(parameters if call.parameters is None else ()))
        ctx.call = call
        ctx.conditions = None if call.parameters is None else Conditions(hidden_states.device)
        no_sums = gradient_sums(parameters, [False] * len(parameters))
        losses = call.of_head.run(flat(hidden_states), labels, None, None, no_sums)
        forget_casts(hidden_states.device)
        # Not the negative: an ignored token has 0, not -0.
        return (0 - losses).view(hidden_states.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _LogProbsCall = ctx.call
        hidden_states, labels, *saved = ctx.saved_tensors
        _, needs_x, *needs = ctx.needs_input_grad
        x = flat(hidden_states)
        dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
        sums = gradient_sums(saved if call.parameters is None else call.parameters, needs)
        conditions: AbstractContextManager[None] = (
            autocast_disabled(x.device) if ctx.conditions is None else ctx.conditions.restored()
        )
        with conditions:
            # In the order of the forward, so that each chunk draws the random numbers that it drew there.
            call.of_head.run(x, labels, grad_output.flatten().neg().contiguous(), dx, sums)
        return None, dx.view(hidden_states.shape) if dx is not None else None, *(each.rounded() for each in sums)

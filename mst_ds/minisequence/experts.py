"""Chunked experts: of a mixture of experts, one chunk of one expert's tokens is worked on at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import ceil_divide, chunk_slices

from .chunks import (
    Linear,
    autocast_disabled,
    call_operator,
    cast_for_autocast,
    gradient_sums,
    require_gathered,
    unrounded_product,
)

Gate = Callable[[Tensor], Tensor]


def chunked_experts(
    hidden_states: Tensor,
    expert_index: Tensor,
    expert_weights: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    chunks: int,
    gate: Gate,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    is_recomputing: bool = False,
) -> Tensor:
    """For each token the sum over its experts of `weight * down(gate(up(x)))`, worked through in chunks.

    MsT (arXiv 2407.15892) for a mixture of experts. Tokens are sorted by expert, and each expert's tokens taken in
    chunks; so an expert's weight gradient is complete when its last chunk is done, and only one expert's is held in
    fp32 (fp64 for biases). The forward keeps only the inputs; the backward computes the up projection again, never the
    down projection. The loop contains no collective.

    Args:
        hidden_states: (T, H).
        expert_index: (T, k), integers; each token's experts, all different. Numbers of E and above name no expert.
        expert_weights: (T, k), what the router gives them.
        up_weight: (E, U, H), with the gate in it U = 2 I.
        down_weight: (E, H, I).
        chunks: a chunk is at most 1/chunks of the T * k rows, and of one expert; never shorter than 4 rows for more.
        gate: (t, U) to (t, I), elementwise over t, deterministic and not in place; differentiated by autograd.
        up_bias: (E, U) or None.
        down_bias: (E, H) or None.
        transposed: weights are (E, inputs, outputs), as in GPT-OSS.
        is_recomputing: torch.utils.checkpoint computes the layer again, and ends with the last tensor that its backward
            needs; so the output is computed only if it goes on after this call.

    Returns:
        (T, H), the dtype of `hidden_states`. Sums are in fp32 at least.

    Raises:
        ValueError: `chunks` below 1, tensors of other shapes, or a weight that ZeRO-3 has not gathered.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    require_gathered("up_weight", up_weight)
    require_gathered("down_weight", down_weight)
    tokens = hidden_states.shape[:-1]
    if hidden_states.dim() != 2 or not expert_index.shape == expert_weights.shape == (*tokens, expert_index.shape[-1]):
        raise ValueError(
            "hidden_states must be (tokens, hidden), expert_index and expert_weights (tokens, experts of a token); got "
            f"{tuple(hidden_states.shape)}, {tuple(expert_index.shape)}, {tuple(expert_weights.shape)}"
        )
    tensors = cast_for_autocast(hidden_states, up_weight, down_weight, up_bias, down_bias)
    call = _ExpertsCall(gate, chunks, transposed, hidden_states.dtype, is_recomputing)
    with autocast_disabled(hidden_states.device):
        return call_operator(_ChunkedExperts, _compute, call, expert_index, expert_weights, *tensors)


class _ExpertsCall(NamedTuple):
    gate: Gate
    chunks: int
    transposed: bool
    dtype: torch.dtype
    is_recomputing: bool


class _Parameters(NamedTuple):
    """Of all experts or of one: the tensors, or the sums of their gradients."""

    up_weight: Any
    down_weight: Any
    up_bias: Any
    down_bias: Any


class _Rows(NamedTuple):
    """A chunk of one expert's rows: which tokens they are, and where in (T, k) they stand."""

    tokens: Tensor
    places: Tensor


def _chunks_by_expert(expert_index: Tensor, num_experts: int, chunks: int) -> Iterator[tuple[int, list[_Rows]]]:
    """Each expert that has tokens, and its chunks in the order of the tokens."""
    k = expert_index.shape[-1]
    flat = expert_index.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat.clamp(max=num_experts), minlength=num_experts + 1)[:num_experts].tolist()
    longest = max(1, ceil_divide(len(flat), chunks))
    start = 0
    for expert, count in enumerate(counts):
        places = order[start : start + count]
        start += count
        if count:
            slices = chunk_slices(count, ceil_divide(count, longest))
            yield expert, [_Rows(places[rows] // k, places[rows]) for rows in slices]


def _of_expert(parameters: _Parameters, expert: int) -> _Parameters:
    return _Parameters(*(tensor[expert] if tensor is not None else None for tensor in parameters))


def _layers(call: _ExpertsCall, of_expert: _Parameters) -> tuple[Linear, Linear]:
    """Up and down."""
    up, down = of_expert.up_weight, of_expert.down_weight
    if call.transposed:
        up, down = up.t(), down.t()
    return Linear(up, of_expert.up_bias), Linear(down, of_expert.down_bias)


def _compute(call: _ExpertsCall, *tensors: Tensor, out: Tensor | None = None) -> Tensor:
    total = _unrounded(call, *tensors)
    return total.to(call.dtype) if out is None else out.copy_(total)


def _unrounded(call: _ExpertsCall, expert_index: Tensor, expert_weights: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
    parameters = _Parameters(*tensors)
    total = torch.zeros_like(x, dtype=sum_dtype(x.dtype), memory_format=torch.contiguous_format)
    scores = expert_weights.flatten()
    for expert, chunks in _chunks_by_expert(expert_index, len(parameters.up_weight), call.chunks):
        up, down = _layers(call, _of_expert(parameters, expert))
        for rows in chunks:
            inner = call.gate(torch.nn.functional.linear(x[rows.tokens], *up))
            result = torch.nn.functional.linear(inner, *down)
            # A token has an expert once, so no two rows of a chunk add to one place.
            total.index_add_(0, rows.tokens, (result * scores[rows.places, None]).to(total.dtype))
    return total


class _ChunkedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _ExpertsCall, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        if not call.is_recomputing:
            return _compute(call, *tensors)
        _, _, x, *_ = tensors
        return torch.empty_like(x, dtype=call.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _ExpertsCall = ctx.call
        expert_index, expert_weights, x, *tensors = ctx.saved_tensors
        _, _, needs_scores, needs_x, *needs = ctx.needs_input_grad
        parameters = _Parameters(*tensors)
        dtype = sum_dtype(x.dtype)
        dx = torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if needs_x else None
        d_scores = torch.zeros(expert_weights.numel(), dtype=dtype, device=x.device) if needs_scores else None
        grads = [torch.zeros_like(tensor) if needed else None for tensor, needed in zip(tensors, needs, strict=True)]
        scores = expert_weights.flatten()
        with autocast_disabled(x.device):
            for expert, chunks in _chunks_by_expert(expert_index, len(parameters.up_weight), call.chunks):
                of_expert = _of_expert(parameters, expert)
                up, down = _layers(call, of_expert)
                sums = _Parameters(*gradient_sums(of_expert, needs, transposed=call.transposed))
                for rows in chunks:
                    d_inner, d_score = _backward_chunk(
                        call.gate, up, down, sums, x[rows.tokens], grad_output[rows.tokens], scores[rows.places, None]
                    )
                    if dx is not None:
                        dx.index_add_(0, rows.tokens, torch.mm(d_inner, up.weight).to(dtype))
                    if d_scores is not None:
                        d_scores[rows.places] = d_score
                for grad, gradient in zip(grads, sums, strict=True):
                    if grad is not None and gradient.total is not None:
                        grad[expert] = gradient.total
        d_weights = d_scores.view_as(expert_weights).to(expert_weights.dtype) if d_scores is not None else None
        return None, None, d_weights, dx.to(x.dtype) if dx is not None else None, *grads


def _backward_chunk(
    gate: Gate, up: Linear, down: Linear, sums: _Parameters, x: Tensor, dy: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Add one chunk's parameter gradients to `sums`.

    Args:
        x, dy: (t, H); scores: (t, 1).

    Returns:
        The gradient of the up projection's output, (t, U), and that of the scores, (t,).
    """
    inner = torch.nn.functional.linear(x, *up)
    with torch.enable_grad():
        inner.requires_grad_()
        gated = gate(inner)
    product = gated.detach()
    d_product = unrounded_product(dy.to(down.weight.dtype), down.weight)
    # <dy, down(product)> without the down projection: <dy @ down, product>.
    d_score = (d_product * product).sum(-1)
    if down.bias is not None:
        d_score = d_score + (dy * down.bias).sum(-1, dtype=d_score.dtype)
    weighted = (dy * scores).to(x.dtype)
    sums.down_weight.add_outer_products(weighted, product)
    sums.down_bias.add_column_sums(weighted)
    (d_inner,) = torch.autograd.grad(gated, inner, (d_product * scores).to(x.dtype))
    sums.up_weight.add_outer_products(d_inner, x)
    sums.up_bias.add_column_sums(d_inner)
    return d_inner, d_score

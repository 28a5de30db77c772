"""Chunked experts: of a mixture of experts, one chunk of one expert's tokens is worked on at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import ceil_divide, chunk_slices

from .chunks import (
    add_column_sums,
    add_outer_products,
    autocast_disabled,
    cast_for_autocast,
    require_gathered,
    unrounded_product,
    zeros_for_accumulation,
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
    device = hidden_states.device
    tensors = (hidden_states, up_weight, down_weight, up_bias, down_bias)
    x, *parameters = (cast_for_autocast(tensor, device) for tensor in tensors)
    work = _Work(gate, chunks, transposed)
    assert x is not None
    with autocast_disabled(device):
        output: Tensor = _ChunkedExperts.apply(
            work, hidden_states.dtype, not is_recomputing, expert_index, expert_weights, x, *parameters
        )
        if is_recomputing:
            with torch.no_grad():
                output.copy_(_compute(work, expert_index, expert_weights, x, *parameters))
    return output


class _Work(NamedTuple):
    gate: Gate
    chunks: int
    transposed: bool


class _Rows(NamedTuple):
    """A chunk of one expert's rows: which tokens they are, and where in (T, k) they stand."""

    expert: int
    tokens: Tensor
    places: Tensor


def _chunks_by_expert(expert_index: Tensor, num_experts: int, chunks: int) -> Iterator[list[_Rows]]:
    """For each expert that has tokens its chunks, in the order of the tokens."""
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
            yield [_Rows(expert, places[rows] // k, places[rows]) for rows in slices]


def _compute(
    work: _Work, expert_index: Tensor, expert_weights: Tensor, x: Tensor, *parameters: Tensor | None
) -> Tensor:
    assert parameters[0] is not None
    out = torch.zeros_like(x, dtype=sum_dtype(x.dtype), memory_format=torch.contiguous_format)
    scores = expert_weights.flatten()
    for of_expert in _chunks_by_expert(expert_index, len(parameters[0]), work.chunks):
        up, down, up_bias, down_bias = _of_expert(parameters, of_expert[0].expert, work.transposed)
        for rows in of_expert:
            inner = work.gate(torch.nn.functional.linear(x[rows.tokens], up, up_bias))
            result = torch.nn.functional.linear(inner, down, down_bias)
            # A token has an expert once, so no two rows of a chunk add to one place.
            out.index_add_(0, rows.tokens, (result * scores[rows.places, None]).to(out.dtype))
    return out


class _ChunkedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: _Work,
        dtype: torch.dtype,
        computes: bool,
        expert_index: Tensor,
        expert_weights: Tensor,
        x: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(expert_index, expert_weights, x, *parameters)
        ctx.gate, ctx.chunks, ctx.transposed = work
        if not computes:
            return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
        return _compute(work, expert_index, expert_weights, x, *parameters).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        expert_index, expert_weights, x, *parameters = ctx.saved_tensors
        needs_scores, needs_x, *needs = ctx.needs_input_grad[4:]
        dtype = sum_dtype(x.dtype)
        dx = torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if needs_x else None
        d_scores = torch.zeros(expert_weights.numel(), dtype=dtype, device=x.device) if needs_scores else None
        grads = [
            torch.zeros_like(parameter) if needed else None for parameter, needed in zip(parameters, needs, strict=True)
        ]
        scores = expert_weights.flatten()
        with autocast_disabled(x.device):
            for of_expert in _chunks_by_expert(expert_index, len(parameters[0]), ctx.chunks):
                expert = of_expert[0].expert
                weights = _of_expert(parameters, expert, ctx.transposed)
                sums = [zeros_for_accumulation(grad[expert]) if grad is not None else None for grad in grads]
                totals = _of_expert([total[None] if total is not None else None for total in sums], 0, ctx.transposed)
                for rows in of_expert:
                    d_rows, d_score = _backward_chunk(
                        ctx.gate, x[rows.tokens], grad_output[rows.tokens], scores[rows.places, None], weights, totals
                    )
                    if dx is not None:
                        dx.index_add_(0, rows.tokens, torch.mm(d_rows, weights[0]).to(dtype))
                    if d_scores is not None:
                        d_scores[rows.places] = d_score
                for grad, total in zip(grads, sums, strict=True):
                    if grad is not None and total is not None:
                        grad[expert] = total
        return (
            *(None,) * 4,
            d_scores.view_as(expert_weights).to(expert_weights.dtype) if d_scores is not None else None,
            dx.to(x.dtype) if dx is not None else None,
            *grads,
        )


def _of_expert(parameters: Sequence[Tensor | None], expert: int, transposed: bool) -> list[Any]:
    """Up and down weight of one expert, (outputs, inputs), and their biases."""
    up, down, up_bias, down_bias = (parameter[expert] if parameter is not None else None for parameter in parameters)
    if transposed:
        up, down = (weight.t() if weight is not None else None for weight in (up, down))
    return [up, down, up_bias, down_bias]


def _backward_chunk(
    gate: Gate, x: Tensor, dy: Tensor, scores: Tensor, weights: Sequence[Any], totals: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Add one chunk's parameter gradients to `totals`.

    Args:
        x, dy: (t, H); scores: (t, 1).

    Returns:
        The gradient of the up projection's output, (t, U), and that of the scores, (t,).
    """
    up, down, up_bias, down_bias = weights
    d_up, d_down, d_up_bias, d_down_bias = totals
    inner = torch.nn.functional.linear(x, up, up_bias)
    with torch.enable_grad():
        inner.requires_grad_()
        gated = gate(inner)
    product = gated.detach()
    d_product = unrounded_product(dy.to(down.dtype), down)
    # <dy, down(product)> without the down projection: <dy @ down, product>.
    d_score = (d_product * product).sum(-1)
    if down_bias is not None:
        d_score = d_score + (dy * down_bias).sum(-1, dtype=d_score.dtype)
    weighted = (dy * scores).to(x.dtype)
    if d_down is not None:
        add_outer_products(d_down, weighted, product)
    if d_down_bias is not None:
        add_column_sums(d_down_bias, weighted)
    (d_inner,) = torch.autograd.grad(gated, inner, (d_product * scores).to(x.dtype))
    if d_up is not None:
        add_outer_products(d_up, d_inner, x)
    if d_up_bias is not None:
        add_column_sums(d_up_bias, d_inner)
    return d_inner, d_score

"""Any module that works token by token, chunk by chunk: norms, and MLPs with adapters or dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.geometry import chunk_slices
from mst_ds.recompute import Conditions

from .chunks import (
    GradientSum,
    ParameterSums,
    flat,
    flat_view,
    forget_casts,
    gradient_sums,
    require_gathered,
    rounded_own,
)
from .linear_sums import SumLinearGradients, differentiate


def chunked_tokenwise(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    chunks: int,
    sums: ParameterSums | None = None,
    skips_output: bool = False,
) -> Tensor:
    """`function(*inputs)` in chunks of tokens, for a function whose output for a token depends on that token alone.

    MsT (arXiv 2407.15892) for whatever has no operator of its own. The forward keeps only `inputs`; the backward runs
    the function again for each chunk, with the random numbers that the forward drew and under its autocast, and
    differentiates it by autograd. Parameter gradients are summed over chunks in fp32 (fp64 for biases and for fp64
    parameters) and leave through autograd once; only those of linear layers are not rounded before they are summed.
    `function` may contain no collective.

    Args:
        function: takes a chunk of each input, with the same leading dimensions of size 1, and reads `parameters`.
        inputs: (..., C_i), the same number of tokens in each; of any dtype, differentiated where floating.
        parameters: what `function` reads and gradients are wanted for, where they require them.
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.
        sums, skips_output: as `chunked_mlp` has them.

    Returns:
        (..., C), the leading dimensions of the first input.

    Raises:
        ValueError: `chunks` below 1, or a parameter that ZeRO-3 has not gathered.
    """
    for parameter in parameters:
        require_gathered("a parameter", parameter)
    given, left = ParameterSums.take(sums, parameters, inputs)
    call = _TokenwiseCall(function, chunks, skips_output, len(inputs), tuple(parameters), given)
    output: Tensor = _ChunkedTokenwise.apply(call, *inputs, *left)
    return output


class _TokenwiseCall(NamedTuple):
    function: Callable[..., Tensor]
    chunks: int
    skips_output: bool
    num_inputs: int
    parameters: Sequence[Tensor]
    given_sums: Sequence[GradientSum | None]


def compute_in_chunks(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], chunks: int, out: Tensor | None = None
) -> Tensor:
    """The output of `chunked_tokenwise`, without a gradient."""
    leading = inputs[0].shape[:-1]
    tokens = [flat(tensor) for tensor in inputs]  # once: it may be a copy
    for rows in chunk_slices(leading.numel(), chunks):
        chunk = function(*(_take(each, rows, len(leading)) for each in tokens))
        if out is None:
            # Not a view: models may add to it in place.
            out = chunk.new_empty(*leading, chunk.shape[-1])
        flat_view(out)[rows] = flat(chunk)
    assert out is not None
    return out


def _compute(call: _TokenwiseCall, *tensors: Tensor, out: Tensor | None = None) -> Tensor:
    out = compute_in_chunks(call.function, tensors[: call.num_inputs], call.chunks, out)
    forget_casts(out.device)
    return out


def _uncomputed(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """A tensor like the output; its width and dtype are the function's secret, which a first token tells."""
    leading = inputs[0].shape[:-1]
    token = function(*(_take(flat(tensor), slice(1), len(leading)) for tensor in inputs))
    forget_casts(token.device)
    return token.new_empty(*leading, token.shape[-1])


class _ChunkedTokenwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _TokenwiseCall, *tensors: Tensor) -> Tensor:
        inputs = tensors[: call.num_inputs]
        # Parameters are not saved with the inputs: others would be given back than those that `function` reads.
        ctx.save_for_backward(*inputs)
        ctx.call = call
        ctx.conditions = Conditions(inputs[0].device)
        if not call.skips_output:
            return _compute(call, *tensors)
        with ctx.conditions.restored():
            return _uncomputed(call.function, inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _TokenwiseCall = ctx.call
        _, *needs = ctx.needs_input_grad
        inputs = ctx.saved_tensors  # recompute lets them be asked for once
        leading, tokens, dy = inputs[0].dim() - 1, [flat(tensor) for tensor in inputs], flat(grad_output)
        d_inputs = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
            for tensor, needed in zip(inputs, needs[: call.num_inputs], strict=True)
        ]
        sums = gradient_sums(call.parameters, needs[call.num_inputs :], call.given_sums)
        with ctx.conditions.restored():
            # In the order of the forward, so that each chunk draws the random numbers that it drew there.
            for rows in chunk_slices(dy.shape[0], call.chunks):
                leaves = [
                    _take(each, rows, leading).detach().requires_grad_(grad is not None)
                    for each, grad in zip(tokens, d_inputs, strict=True)
                ]
                with torch.enable_grad(), SumLinearGradients(sums):
                    out = call.function(*leaves)
                d_rows = [flat_view(grad)[rows] if grad is not None else None for grad in d_inputs]
                differentiate(out, dy[rows].view_as(out), leaves, d_rows, sums)
                # Not beside the next chunk's.
                del leaves, out
        return None, *d_inputs, *rounded_own(sums, call.given_sums)


def _take(tokens: Tensor, rows: slice, leading: int) -> Tensor:
    """Some of (tokens, C), with so many dimensions before the last."""
    chunk = tokens[rows]
    return chunk.view(*(1,) * (leading - 1), *chunk.shape)

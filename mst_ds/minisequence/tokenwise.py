"""Any module that works token by token, chunk by chunk: norms, and MLPs with adapters or dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.geometry import chunk_slices
from mst_ds.recompute import RandomState

from .chunks import require_gathered, zeros_for_accumulation
from .linear_sums import SumLinearGradients, gradients_of


def chunked_tokenwise(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    *,
    chunks: int,
    is_recomputing: bool = False,
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
        is_recomputing: as `chunked_mlp` has it.

    Returns:
        (..., C), the leading dimensions of the first input.

    Raises:
        ValueError: `chunks` below 1, or a parameter that ZeRO-3 has not gathered.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    for parameter in parameters:
        require_gathered("a parameter", parameter)
    output: Tensor = _ChunkedTokenwise.apply(function, chunks, not is_recomputing, len(inputs), *inputs, *parameters)
    if is_recomputing:
        with torch.no_grad():
            output.copy_(compute_in_chunks(function, inputs, chunks))
        torch.clear_autocast_cache()
    return output


def compute_in_chunks(function: Callable[..., Tensor], inputs: Sequence[Tensor], chunks: int) -> Tensor:
    """The output of `chunked_tokenwise`, without a gradient."""
    out: Tensor | None = None
    leading = inputs[0].shape[:-1]
    for rows in chunk_slices(leading.numel(), chunks):
        chunk = function(*(_take(tensor, rows) for tensor in inputs))
        if out is None:
            # Not a view: models may add to it in place.
            out = chunk.new_empty(*leading, chunk.shape[-1])
        out.view(-1, out.shape[-1])[rows] = chunk.reshape(-1, chunk.shape[-1])
    assert out is not None
    return out


def _uncomputed(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """A tensor like the output; its width and dtype are the function's secret, which a first token tells."""
    token = function(*(_take(tensor, slice(1)) for tensor in inputs))
    return token.new_empty(*inputs[0].shape[:-1], token.shape[-1])


class _ChunkedTokenwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], chunks: int, computes: bool, num_inputs: int, *tensors: Tensor
    ) -> Tensor:
        inputs, parameters = tensors[:num_inputs], tensors[num_inputs:]
        ctx.save_for_backward(*inputs)
        # Not saved with the inputs: recompute and offload would give others back than those that `function` reads.
        ctx.function, ctx.chunks, ctx.parameters = function, chunks, parameters
        ctx.conditions = _Conditions(inputs[0].device)
        if computes:
            out = compute_in_chunks(function, inputs, chunks)
        else:
            with ctx.conditions.restored():
                out = _uncomputed(function, inputs)
        if ctx.conditions.autocast_enabled:
            # torch 2.9 keeps casts of weights that were made without gradients, and would use them in the backward.
            torch.clear_autocast_cache()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs, parameters = ctx.needs_input_grad[4:], ctx.parameters
        inputs = ctx.saved_tensors  # recompute lets them be asked for once
        dy = grad_output.reshape(-1, grad_output.shape[-1])
        input_grads = [
            torch.empty_like(tensor, memory_format=torch.contiguous_format) if needed else None
            for tensor, needed in zip(inputs, needs, strict=False)
        ]
        sums = [
            (parameter, zeros_for_accumulation(parameter))
            for parameter, needed in zip(parameters, needs[len(inputs) :], strict=True)
            if needed
        ]
        with ctx.conditions.restored():
            # In the order of the forward, so that each chunk draws the random numbers that it drew there.
            for rows in chunk_slices(dy.shape[0], ctx.chunks):
                _backward_chunk(ctx.function, rows, inputs, input_grads, sums, dy[rows])
        grads = {id(parameter): total.to(parameter.dtype) for parameter, total in sums}
        return None, None, None, None, *input_grads, *(grads.get(id(parameter)) for parameter in parameters)


def _backward_chunk(
    function: Callable[..., Tensor],
    rows: slice,
    inputs: Sequence[Tensor],
    input_grads: Sequence[Tensor | None],
    sums: Sequence[tuple[Tensor, Tensor]],
    dy: Tensor,
) -> None:
    pieces = [_take(tensor, rows).detach() for tensor in inputs]
    for piece, grad in zip(pieces, input_grads, strict=True):
        piece.requires_grad_(grad is not None)
    with torch.enable_grad(), SumLinearGradients(sums):
        out = function(*pieces)
    wanted = [piece for piece in pieces if piece.requires_grad] + [parameter for parameter, _ in sums]
    grads = iter(gradients_of(out, wanted, dy.view_as(out)))
    for grad in input_grads:
        if grad is not None:
            part = next(grads)
            into = grad.view(-1, grad.shape[-1])[rows]
            into.zero_() if part is None else into.copy_(part.reshape(into.shape))
    for (_, total), part in zip(sums, grads, strict=True):
        if part is not None:
            total.add_(part)


def _take(tensor: Tensor, rows: slice) -> Tensor:
    """Some tokens of (..., C), with as many dimensions as before."""
    chunk = tensor.reshape(-1, tensor.shape[-1])[rows]
    return chunk.view(*(1,) * (tensor.dim() - 2), *chunk.shape)


class _Conditions:
    """What a forward ran under and its recompute needs again: the states of the random generators, and autocast."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.random_state = RandomState(device)
        self.autocast_enabled = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within, all is as it was; random states are put back afterwards."""
        autocast = torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_enabled)
        with self.random_state.restored(), autocast:
            yield

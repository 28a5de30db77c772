"""Chunked MLP: no tensor of intermediate size is ever alive for more than one chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import (
    add_column_sums,
    add_outer_products,
    autocast_disabled,
    cast_for_autocast,
    chunk_slices,
    require_gathered,
    zeros_for_accumulation,
)

Activation = Callable[[Tensor], Tensor]


def chunked_mlp(
    hidden_states: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    chunks: int,
    activation: Activation = torch.nn.functional.silu,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate, worked through in chunks.

    The MLP half of MsT (arXiv 2407.15892, section 3.2). The forward keeps only `hidden_states`; the backward computes
    gate and up again for each chunk, never the down projection. Weight gradients are summed over chunks in fp32 (fp64
    for biases and for fp64 weights), leave through autograd once, and are rounded to the weight's dtype once. The loop
    contains no collective, so ranks may use different chunk counts.

    Args:
        hidden_states: (..., H). Chunks are taken over all leading dimensions flattened.
        gate_weight: (I, H), or None for a plain two-layer MLP.
        up_weight: (I, H).
        down_weight: (H, I).
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.
        activation: elementwise, deterministic and not in place; differentiated by autograd, one chunk at a time.
        gate_bias, up_bias: (I,) or None.
        down_bias: (H,) or None.

    Returns:
        (..., H), the dtype of `hidden_states` (under autocast: the autocast dtype).

    Raises:
        ValueError: `chunks` below 1, or a weight that ZeRO-3 has not gathered.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    for name, weight in (
        ("gate_weight", gate_weight),
        ("up_weight", up_weight),
        ("down_weight", down_weight),
    ):
        if weight is not None:
            require_gathered(name, weight)
    device = hidden_states.device
    tensors = (hidden_states, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    cast = [cast_for_autocast(tensor, device) for tensor in tensors]
    with autocast_disabled(device):
        return _ChunkedMLP.apply(activation, chunks, *cast)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


class _ChunkedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        chunks: int,
        hidden_states: Tensor,
        gate_weight: Tensor | None,
        up_weight: Tensor,
        down_weight: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(hidden_states, gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
        ctx.activation, ctx.chunks = activation, chunks
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = x.new_empty(x.shape[0], down_weight.shape[0])
        for rows in chunk_slices(x.shape[0], chunks):
            # At most two tensors of intermediate size are alive: the product is written over one of them.
            if gate_weight is None:
                product = activation(_linear(x[rows], up_weight, up_bias))
            else:
                product = activation(_linear(x[rows], gate_weight, gate_bias))
                product.mul_(_linear(x[rows], up_weight, up_bias))
            _linear(product, down_weight, down_bias, out=out[rows])
            del product
        return out.view(*hidden_states.shape[:-1], down_weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden_states, *parameters = ctx.saved_tensors
        needs = ctx.needs_input_grad[2:]
        with autocast_disabled(hidden_states.device):
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            dy = grad_output.reshape(-1, grad_output.shape[-1])
            dx = torch.empty_like(x) if needs[0] else None
            sums = [
                zeros_for_accumulation(parameter) if needed else None
                for parameter, needed in zip(parameters, needs[1:], strict=True)
            ]
            for rows in chunk_slices(x.shape[0], ctx.chunks):
                _backward_chunk(
                    ctx.activation, x[rows], dy[rows], dx[rows] if dx is not None else None, parameters, sums
                )
        grads = (
            total.to(parameter.dtype) if total is not None else None
            for parameter, total in zip(parameters, sums, strict=True)
        )
        return None, None, dx.view_as(hidden_states) if dx is not None else None, *grads


def _backward_chunk(
    activation: Activation,
    x: Tensor,
    dy: Tensor,
    dx: Tensor | None,
    parameters: list[Tensor | None],
    sums: list[Tensor | None],
) -> None:
    """Add one chunk's parameter gradients to `sums` and write its input gradient to `dx`.

    The order below never has more than five tensors of intermediate size alive, and writes over each as soon as its
    value is not needed again.
    """
    gate_weight, up_weight, down_weight, gate_bias, up_bias, _ = parameters
    d_gate_weight, d_up_weight, d_down_weight, d_gate_bias, d_up_bias, d_down_bias = sums
    assert up_weight is not None
    assert down_weight is not None

    if gate_weight is None:
        inner, up = _linear(x, up_weight, up_bias), None
    else:
        inner, up = _linear(x, gate_weight, gate_bias), _linear(x, up_weight, up_bias)
    with torch.enable_grad():
        inner.requires_grad_()
        activated = activation(inner)
    product = activated.detach()
    d_inner_out = torch.mm(dy, down_weight)
    d_up = None
    if up is not None:
        d_up = d_inner_out * product
        d_inner_out.mul_(up)
        product = up.mul_(product)
    if d_down_weight is not None:
        add_outer_products(d_down_weight, dy, product)
    if d_down_bias is not None:
        add_column_sums(d_down_bias, dy)
    del product, up
    (d_inner,) = torch.autograd.grad(activated, inner, d_inner_out)
    del activated, inner, d_inner_out

    if gate_weight is None:
        branches = [(d_inner, up_weight, d_up_weight, d_up_bias)]
    else:
        assert d_up is not None
        branches = [
            (d_inner, gate_weight, d_gate_weight, d_gate_bias),
            (d_up, up_weight, d_up_weight, d_up_bias),
        ]
    for index, (grad, weight, d_weight, d_bias) in enumerate(branches):
        if d_weight is not None:
            add_outer_products(d_weight, grad, x)
        if d_bias is not None:
            add_column_sums(d_bias, grad)
        if dx is not None:
            if index == 0:
                torch.mm(grad, weight, out=dx)
            else:
                dx.addmm_(grad, weight)

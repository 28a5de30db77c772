"""Chunked MLP: only what is kept on request is of intermediate size for more than one chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from mst_ds.geometry import chunk_slices
from mst_ds.recompute import Kept

from .chunks import (
    Scratch,
    add_column_sums,
    add_outer_products,
    autocast_disabled,
    cast_for_autocast,
    require_gathered,
    zeros_for_accumulation,
)

Activation = Callable[[Tensor], Tensor]


class KeptProjections:
    """Gate and up of one call, from its layer's forward until the layer is computed again.

    Args:
        keep: how a tensor is kept.
    """

    def __init__(self, keep: Callable[[Tensor], Kept]) -> None:
        self._keep = keep
        self._kept: list[Kept] = []

    def put(self, tensors: Sequence[Tensor]) -> None:
        """Keep what the forward has computed."""
        self._kept = [self._keep(tensor) for tensor in tensors]

    def take(self) -> list[Tensor]:
        """What was kept, which is kept no longer: a second call is an error."""
        return [kept.take() for kept in self._kept]


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
    gate_in_up: bool = False,
    transposed: bool = False,
    keep: bool | KeptProjections = False,
    is_recomputing: bool = False,
) -> Tensor:
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate, worked through in chunks.

    The MLP half of MsT (arXiv 2407.15892, section 3.2). Unless `keep` says otherwise the forward keeps only
    `hidden_states`, and the backward computes gate and up again for each chunk, never the down projection. Weight
    gradients are summed over chunks in fp32 (fp64 for biases and for fp64 weights), leave through autograd once, and
    are rounded to the weight's dtype once. The loop contains no collective, so ranks may use different chunk counts.

    Args:
        hidden_states: (..., H). Chunks are taken over all leading dimensions flattened.
        gate_weight: (I, H), or None for a plain two-layer MLP.
        up_weight: (I, H).
        down_weight: (H, I).
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.
        activation: elementwise, deterministic and not in place; differentiated by autograd, one chunk at a time.
        gate_bias, up_bias: (I,) or None.
        down_bias: (H,) or None.
        gate_in_up: the gate's rows come first in `up_weight`, (2 I, H), and in `up_bias`, (2 I,), as in Phi-3; the
            gate's own weight and bias are None.
        transposed: weights are (inputs, outputs), as in GPT-2: (H, I) or (H, 2 I) up and (I, H) down.
        keep: the forward keeps gate and up too (without a gate, up), each (tokens, I); the backward computes nothing
            again and returns the same, bit for bit. True: autograd keeps them. In a layer that is computed again, where
            they lie between its two calls, of which the second takes what the first has put there.
        is_recomputing: torch.utils.checkpoint computes the layer again, and ends with the last tensor that its backward
            needs; so the output is computed only if it goes on after this call.

    Returns:
        (..., H), the dtype of `hidden_states` (under autocast: the autocast dtype).

    Raises:
        ValueError: `chunks` below 1, a gate both in `gate_weight` and in `up_weight`, `keep` True with
            `is_recomputing`, or a weight that ZeRO-3 has not gathered.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    if gate_in_up and (gate_weight is not None or gate_bias is not None):
        raise ValueError("gate_in_up says that up_weight holds the gate: gate_weight and gate_bias must be None")
    if keep is True and is_recomputing:
        raise ValueError("keep is True, but the layer is computed again: keep must be False or a KeptProjections")
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
    has_backward = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in cast)
    work = _Work(activation, chunks, _Layout(gate_in_up, transposed))
    kept: Sequence[Tensor] = ()
    if keep and has_backward:
        kept = keep.take() if isinstance(keep, KeptProjections) and is_recomputing else _empty_kept(work, *cast)
    with autocast_disabled(device):
        output: Tensor = _ChunkedMLP.apply(work, kept, not is_recomputing, *cast)
        if is_recomputing:
            with torch.no_grad():
                _compute(work, output, kept, True, *cast)
    if isinstance(keep, KeptProjections) and not is_recomputing:
        keep.put(kept)
    return output


class _Layout(NamedTuple):
    """How the parameters are stored. What is saved for the backward is the parameter itself, never a view of it: under
    ZeRO-3 a view would keep the gathered weight alive."""

    gate_in_up: bool
    transposed: bool

    def oriented(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors as they are stored, but weights as (outputs, inputs)."""
        weights, biases = tensors[:3], tensors[3:]
        if self.transposed:
            weights = [weight.t() if weight is not None else None for weight in weights]
        return [*weights, *biases]

    def split(self, oriented: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Weights of gate, up and down and their biases, each by itself."""
        gate, up, down, gate_bias, up_bias, down_bias = oriented
        if self.gate_in_up:
            gate, up = up.chunk(2) if up is not None else (None, None)
            gate_bias, up_bias = up_bias.chunk(2) if up_bias is not None else (None, None)
        return [gate, up, down, gate_bias, up_bias, down_bias]


class _Work(NamedTuple):
    activation: Activation
    chunks: int
    layout: _Layout


def _empty_kept(work: _Work, hidden_states: Tensor | None, *parameters: Tensor | None) -> list[Tensor]:
    """Memory for what stands before the activation and what that is multiplied with."""
    down_weight = work.layout.oriented(parameters)[2]
    assert hidden_states is not None
    assert down_weight is not None
    is_gated = work.layout.gate_in_up or parameters[0] is not None
    shape = hidden_states.shape[:-1].numel(), down_weight.shape[1]
    return [hidden_states.new_empty(shape) for _ in range(2 if is_gated else 1)]


class _KeptRows:
    """A chunk's rows of what is kept, where `Scratch` has memory that the next chunk uses again.

    are_filled: what is kept stands in them already.
    """

    def __init__(self, kept: Sequence[Tensor], rows: slice, are_filled: bool) -> None:
        self._rows_of = {name: tensor[rows] for name, tensor in zip(("inner", "up"), kept, strict=False)}
        self.are_filled = are_filled

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        return self._rows_of[name]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _project(memory: Scratch | _KeptRows, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = memory.empty(name, (len(x), len(weight)), x.dtype, x.device)
    if isinstance(memory, _KeptRows) and memory.are_filled:
        return out
    return _linear(x, weight, bias, out=out)


def _compute(work: _Work, output: Tensor, kept: Sequence[Tensor], are_filled: bool, *inputs: Tensor | None) -> None:
    """Writes the output; what `_empty_kept` is for is written to `kept`, if that is given, or read there if filled."""
    hidden_states, *parameters = inputs
    assert hidden_states is not None
    gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias = work.layout.split(
        work.layout.oriented(parameters)
    )
    assert up_weight is not None
    assert down_weight is not None
    x, flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden_states, output))
    scratch = Scratch()
    for rows in chunk_slices(x.shape[0], work.chunks):
        memory = _KeptRows(kept, rows, are_filled) if kept else scratch
        # Beside what is kept, at most two tensors of intermediate size are alive: the up projection is written over the
        # gate's output.
        if gate_weight is None:
            product = work.activation(_project(memory, "inner", x[rows], up_weight, up_bias))
        else:
            inner = _project(memory, "inner", x[rows], gate_weight, gate_bias)
            product = work.activation(inner)
            # An activation may return what it was given.
            is_inner = product.untyped_storage()._cdata == inner.untyped_storage()._cdata
            up = _project(memory, "up" if is_inner or kept else "inner", x[rows], up_weight, up_bias)
            product = torch.mul(product, up, out=None if is_inner and kept else product)
        _linear(product, down_weight, down_bias, out=flat[rows])
        del product


class _ChunkedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        work: _Work,
        kept: Sequence[Tensor],
        computes: bool,
        hidden_states: Tensor,
        *parameters: Tensor | None,
    ) -> Tensor:
        down_weight = work.layout.oriented(parameters)[2]
        assert down_weight is not None
        # Not a view: models may add to it in place.
        output = hidden_states.new_empty(*hidden_states.shape[:-1], down_weight.shape[0])
        ctx.save_for_backward(hidden_states, *parameters, *kept)
        ctx.work = work
        if computes:
            _compute(work, output, kept, False, hidden_states, *parameters)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        work: _Work = ctx.work
        saved = ctx.saved_tensors
        (hidden_states, *parameters), kept = saved[: len(needs)], saved[len(needs) :]
        with autocast_disabled(hidden_states.device):
            x = hidden_states.reshape(-1, hidden_states.shape[-1])
            dy = grad_output.reshape(-1, grad_output.shape[-1])
            dx = torch.empty_like(x) if needs[0] else None
            sums = [
                zeros_for_accumulation(parameter) if needed else None
                for parameter, needed in zip(parameters, needs[1:], strict=True)
            ]
            tensors = work.layout.oriented(parameters), work.layout.oriented(sums), Scratch()
            for rows in chunk_slices(x.shape[0], work.chunks):
                d_rows = dx[rows] if dx is not None else None
                _backward_chunk(work, x[rows], dy[rows], d_rows, [tensor[rows] for tensor in kept], *tensors)
            del tensors  # the scratch is not needed while the sums are rounded
        grads = (
            total.to(parameter.dtype) if total is not None else None
            for parameter, total in zip(parameters, sums, strict=True)
        )
        return None, None, None, dx.view_as(hidden_states) if dx is not None else None, *grads


def _backward_chunk(
    work: _Work,
    x: Tensor,
    dy: Tensor,
    dx: Tensor | None,
    kept: Sequence[Tensor],
    parameters: list[Tensor | None],
    sums: list[Tensor | None],
    scratch: Scratch,
) -> None:
    """Add one chunk's parameter gradients to `sums` and write its input gradient to `dx`.

    The order below never has more than four tensors of intermediate size alive, without a gate three, of which one is
    made by the activation or its gradient, which make more where they are several operations; beside what is kept one
    less. Each is written over as soon as its value is not needed again; but not what is kept, which a retained graph
    reads again.
    """
    gate_weight, up_weight, down_weight, gate_bias, up_bias, _ = work.layout.split(parameters)
    d_down_weight, d_down_bias = sums[2], sums[5]
    assert up_weight is not None
    assert down_weight is not None
    # Not there any more where two gradients are put together in one.
    projections = Scratch() if work.layout.gate_in_up else scratch

    up: Tensor | None
    if kept:
        inner, up = kept[0], kept[1] if len(kept) == 2 else None
    elif gate_weight is None:
        inner, up = _project(projections, "inner", x, up_weight, up_bias), None
    else:
        inner = _project(projections, "inner", x, gate_weight, gate_bias)
        up = _project(projections, "up", x, up_weight, up_bias)
    with torch.enable_grad():
        # Autograd is told of this chunk's tensor, not of the memory under it.
        inner = inner.detach().requires_grad_()
        activated = work.activation(inner)
        # The way back alone, without the value.
        edge = get_gradient_edge(activated)
    activated = activated.detach()
    # First the product, if there is one, then its gradient, then that of up.
    outer = scratch.empty("outer", activated.shape, x.dtype, x.device)
    if d_down_weight is not None:
        add_outer_products(d_down_weight, dy, activated if up is None else torch.mul(up, activated, out=outer))
    if d_down_bias is not None:
        add_column_sums(d_down_bias, dy)
    torch.mm(dy, down_weight, out=outer)
    d_activated, d_up, memory = outer, None, None
    if up is not None:
        memory = projections.empty("d_activated", up.shape, x.dtype, x.device) if kept else up
        d_activated = torch.mul(outer, up, out=memory)
        d_up = outer.mul_(activated)
    del activated, up
    (d_inner,) = torch.autograd.grad(edge, inner, d_activated)
    del edge, inner, d_activated, memory, projections

    grads = [d_inner] if d_up is None else [d_inner, d_up]
    if work.layout.gate_in_up:
        grads = [torch.cat(grads, dim=1)]
    del d_inner, d_up
    # By the stored weights, so that an input gradient that is one product is rounded once.
    stored = zip(*(tensors[2 - len(grads) : 2] for tensors in (parameters[:3], sums[:3], sums[3:])), strict=True)
    for index, (grad, (weight, d_weight, d_bias)) in enumerate(zip(grads, stored, strict=True)):
        assert weight is not None
        if d_weight is not None:
            add_outer_products(d_weight, grad, x)
        if d_bias is not None:
            add_column_sums(d_bias, grad)
        if dx is not None:
            if index == 0:
                torch.mm(grad, weight, out=dx)
            else:
                dx.addmm_(grad, weight)

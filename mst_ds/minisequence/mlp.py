"""Chunked MLP: only what is kept on request is of intermediate size for more than one chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge

from mst_ds.geometry import chunk_slices
from mst_ds.recompute import Kept

from . import fused
from .chunks import (
    GradientSum,
    Linear,
    ParameterSums,
    Scratch,
    autocast_disabled,
    cast_for_autocast,
    flat,
    flat_view,
    gradient_sums,
    require_gathered,
    rounded_own,
)

Activation = Callable[[Tensor], Tensor]


class KeptProjections:
    """Gate and up of one call, from its forward until it is computed again.

    Args:
        keep: how a tensor is kept.
    """

    def __init__(self, keep: Callable[[Tensor], Kept]) -> None:
        self._keep = keep
        self._kept: tuple[Kept | None, ...] | None = None

    @property
    def is_there(self) -> bool:
        """Whether the forward has kept something."""
        return self._kept is not None

    def put(self, tensors: _Kept) -> None:
        """Keep what the forward has computed."""
        self._kept = tuple(self._keep(tensor) if tensor is not None else None for tensor in tensors)

    def take(self) -> _Kept:
        """What was kept, which is kept no longer: a second call is an error."""
        assert self._kept is not None
        return _Kept(*(kept.take() if kept is not None else None for kept in self._kept))


def chunked_mlp(
    hidden_states: Tensor,
    gate_weight: Tensor | None,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    chunks: int,
    activation: Activation = torch.nn.functional.silu,
    is_silu: bool = False,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    gate_in_up: bool = False,
    transposed: bool = False,
    keep: bool | KeptProjections = False,
    sums: ParameterSums | None = None,
    skips_output: bool = False,
) -> Tensor:
    """`down(activation(gate(x)) * up(x))`, or `down(activation(up(x)))` without a gate, worked through in chunks.

    The MLP half of MsT (arXiv 2407.15892, section 3.2). Unless `keep` says otherwise the forward keeps only
    `hidden_states`, and the backward computes gate and up again for each chunk, never the down projection. Weight
    gradients are summed over chunks in fp32 (fp64 for biases and for fp64 weights), leave through autograd once, and
    are rounded to the weight's dtype once. The loop contains no collective, so ranks may use different chunk counts.

    Args:
        hidden_states: (..., H). Chunks are taken over all leading dimensions flattened.
        gate_weight, up_weight, down_weight: (I, H), or None for an MLP without a gate; (I, H); (H, I).
        chunks: how many chunks; fewer where a chunk would be shorter than 4 tokens.
        activation: elementwise, deterministic and not in place; differentiated by autograd, one chunk at a time.
        is_silu: `activation` computes SiLU, which is one fused kernel with the product where that can be.
        gate_bias, up_bias, down_bias: (I,), (I,) and (H,), or None.
        gate_in_up: the gate's rows come first in `up_weight`, (2 I, H), and `up_bias`, (2 I,), as in Phi-3.
        transposed: weights are (inputs, outputs), as in GPT-2: (H, I) or (H, 2 I) up and (I, H) down.
        keep: the forward keeps gate and up too (without a gate, up), each (tokens, I); the backward computes nothing
            again, and the result is the same, bit for bit. True: autograd keeps them. In a layer that is computed
            again, where they lie between its two calls, of which the second takes what the first has put there.
        sums: of the layer that is computed again: weight gradients are added to these, and do not leave through
            autograd.
        skips_output: the values of the output are not wanted, and left empty: nothing needs them but its backward.

    Returns:
        (..., H), the dtype of `hidden_states` (under autocast: the autocast dtype).

    Raises:
        ValueError: `chunks` below 1, `gate_in_up` with a gate of its own, or a parameter that ZeRO-3 has not gathered.
    """
    is_silu = is_silu or activation is torch.nn.functional.silu
    parameters = _Parameters(gate_weight, up_weight, down_weight, gate_bias, up_bias, down_bias)
    given, left = ParameterSums.take(sums, parameters, [hidden_states])
    kept = _Kept(None, None)
    is_kept = isinstance(keep, KeptProjections) and keep.is_there
    call = _MlpCall(activation, is_silu, chunks, gate_in_up, transposed, is_kept, skips_output, given)
    call.check(parameters)
    tensors = cast_for_autocast(hidden_states, *left)
    if isinstance(keep, KeptProjections):
        kept = keep.take() if is_kept else call.empty_kept(*tensors)
    elif keep and torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        kept = call.empty_kept(*tensors)
    with autocast_disabled(hidden_states.device):
        output: Tensor = _ChunkedMLP.apply(call, *kept, *tensors)
    if isinstance(keep, KeptProjections) and not is_kept:
        keep.put(kept)
    return output


class _Parameters(NamedTuple):
    """The tensors as they are stored, or the sums of their gradients.

    They are saved for the backward themselves, never views of them: under ZeRO-3 a view would keep the gathered weight
    alive.
    """

    gate_weight: Any
    up_weight: Any
    down_weight: Any
    gate_bias: Any
    up_bias: Any
    down_bias: Any


class _Kept(NamedTuple):
    """What stands before the activation and what that is multiplied with, (tokens, I): of all tokens, or of a chunk.

    None where they are not kept; `up` also where there is no gate.
    """

    inner: Tensor | None
    up: Tensor | None

    def of(self, rows: slice) -> _Kept:
        return _Kept(*(tensor[rows] if tensor is not None else None for tensor in self))


class _Layers(NamedTuple):
    gate: Linear | None
    up: Linear
    down: Linear


class _MlpCall(NamedTuple):
    activation: Activation
    is_silu: bool
    chunks: int
    gate_in_up: bool
    transposed: bool
    is_kept: bool
    skips_output: bool
    given_sums: Sequence[GradientSum | None]

    def check(self, parameters: _Parameters) -> None:
        if self.gate_in_up and (parameters.gate_weight is not None or parameters.gate_bias is not None):
            raise ValueError("gate_in_up says that up_weight holds the gate: gate_weight and gate_bias must be None")
        for name, tensor in parameters._asdict().items():
            if tensor is not None:
                require_gathered(name, tensor)

    def oriented(self, weight: Tensor) -> Tensor:
        """(outputs, inputs)."""
        return weight.t() if self.transposed else weight

    def layers(self, of: _Parameters) -> _Layers:
        """Each by itself."""
        gate = Linear(self.oriented(of.gate_weight), of.gate_bias) if of.gate_weight is not None else None
        up, down = Linear(self.oriented(of.up_weight), of.up_bias), Linear(self.oriented(of.down_weight), of.down_bias)
        if self.gate_in_up:
            biases = up.bias.chunk(2) if up.bias is not None else (None, None)
            gate, up = map(Linear, up.weight.chunk(2), biases)
        return _Layers(gate, up, down)

    def is_fused(self, x: Tensor) -> bool:
        """Whether activation and product, where there is one, are one kernel."""
        return self.is_silu and fused.runs(x)

    def empty_kept(self, hidden_states: Tensor, *parameters: Tensor | None) -> _Kept:
        """Memory for what the forward computes."""
        gate, _, down = self.layers(_Parameters(*parameters))
        inner = hidden_states.new_empty(hidden_states.shape[:-1].numel(), down.weight.shape[1])
        return _Kept(inner, torch.empty_like(inner) if gate is not None else None)


def _unpack(inputs: Sequence[Any]) -> tuple[_Kept, Any, _Parameters]:
    """What is kept, hidden states and parameters among the operator's inputs, or what is said of each of them."""
    inner, up, hidden_states, *parameters = inputs
    return _Kept(inner, up), hidden_states, _Parameters(*parameters)


def _project(layer: Linear, x: Tensor, kept: Tensor | None, name: str, scratch: Scratch, is_kept: bool) -> Tensor:
    """A chunk's projection: what is kept of it, or written there if it is not yet; where nothing is, to the scratch."""
    if kept is None:
        kept = scratch.empty(name, (len(x), len(layer.weight)), x.dtype, x.device)
    elif is_kept:
        return kept
    return layer.write(x, kept)


def _fused_product(gate: Tensor, up: Tensor, out: Tensor) -> Tensor:
    from .fused import swiglu

    swiglu.product(gate, up, out)
    return out


def _compute(call: _MlpCall, *tensors: Any, out: Tensor) -> Tensor:
    all_kept, hidden_states, parameters = _unpack(tensors)
    gate, up, down = call.layers(parameters)
    x, flat_out = flat(hidden_states), flat_view(out)
    project = functools.partial(_project, scratch=Scratch(), is_kept=call.is_kept)
    for rows in chunk_slices(x.shape[0], call.chunks):
        kept = all_kept.of(rows)
        # Beside what is kept, at most two tensors of intermediate size are alive: the up projection is written over the
        # gate's output.
        if gate is None:
            product = call.activation(project(up, x[rows], kept.inner, "inner"))
        elif call.is_fused(x):
            inner, factor = project(gate, x[rows], kept.inner, "inner"), project(up, x[rows], kept.up, "up")
            product = _fused_product(inner, factor, torch.empty_like(inner) if kept.inner is not None else inner)
        else:
            inner = project(gate, x[rows], kept.inner, "inner")
            product = call.activation(inner)
            # An activation may return what it was given.
            is_inner = product.untyped_storage()._cdata == inner.untyped_storage()._cdata
            factor = project(up, x[rows], kept.up, "up" if is_inner else "inner")
            product = torch.mul(product, factor, out=None if is_inner and kept.up is not None else product)
        down.write(product, out=flat_out[rows])
        del product
    return out


class _ChunkedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _MlpCall, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        _, hidden_states, parameters = _unpack(tensors)
        down = call.layers(parameters).down
        # Not a view: models may add to it in place.
        output = hidden_states.new_empty(*hidden_states.shape[:-1], len(down.weight))
        return output if call.skips_output else _compute(call, *tensors, out=output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _MlpCall = ctx.call
        kept, hidden_states, parameters = _unpack(ctx.saved_tensors)
        _, needs_x, needs = _unpack(ctx.needs_input_grad[1:])
        with autocast_disabled(hidden_states.device):
            x, dy = flat(hidden_states), flat(grad_output)
            dx = torch.empty_like(x) if needs_x else None
            sums = _Parameters(*gradient_sums(parameters, needs, call.given_sums))
            backward = _Backward(call, parameters, sums)
            for rows in chunk_slices(x.shape[0], call.chunks):
                backward.add_chunk(x[rows], dy[rows], dx[rows] if dx is not None else None, kept.of(rows))
            del backward  # its memory is not needed while the sums are rounded
        d_hidden_states = dx.view_as(hidden_states) if dx is not None else None
        return None, None, None, d_hidden_states, *rounded_own(sums, call.given_sums)


class _Stored(NamedTuple):
    """A projection as it is stored: its weight, (outputs, inputs), and its parameters' sums."""

    weight: Tensor
    d_weight: GradientSum
    d_bias: GradientSum


class _Backward:
    """The chunks of a backward. None has more than four tensors of intermediate size alive, without a gate three, of
    which one is made by the activation or its gradient, which make more where they are several operations; beside what
    is kept one less. With a fused kernel three, beside what is kept two."""

    def __init__(self, call: _MlpCall, parameters: _Parameters, sums: _Parameters) -> None:
        self.call, self.layers, self.sums, self.scratch = call, call.layers(parameters), sums, Scratch()
        # By the stored weights, so that an input gradient that is one product is rounded once.
        self.projections = [_Stored(call.oriented(parameters.up_weight), sums.up_weight, sums.up_bias)]
        if parameters.gate_weight is not None:
            gate = _Stored(call.oriented(parameters.gate_weight), sums.gate_weight, sums.gate_bias)
            self.projections.insert(0, gate)

    def add_chunk(self, x: Tensor, dy: Tensor, dx: Tensor | None, kept: _Kept) -> None:
        """Add a chunk's parameter gradients to the sums and write its input gradient to `dx`."""
        grads = self._of_projections(x, dy, kept)
        if self.call.gate_in_up:
            grads = [torch.cat(grads, dim=1)]
        for index, (grad, stored) in enumerate(zip(grads, self.projections, strict=True)):
            stored.d_weight.add_outer_products(grad, x, transposed=self.call.transposed)
            stored.d_bias.add_column_sums(grad)
            if dx is not None and index == 0:
                torch.mm(grad, stored.weight, out=dx)
            elif dx is not None:
                dx.addmm_(grad, stored.weight)

    def _of_projections(self, x: Tensor, dy: Tensor, kept: _Kept) -> list[Tensor]:
        """The gradient of what stands before the activation, and of what that is multiplied with, if anything.

        Each tensor is written over as soon as its value is not needed again; but not what is kept, which a retained
        graph reads again.
        """
        (gate, up_layer, down), sums, scratch = self.layers, self.sums, self.scratch
        # Not there any more where two gradients are put together in one.
        projections = Scratch() if self.call.gate_in_up else scratch
        project = functools.partial(_project, scratch=projections, is_kept=True)
        inner = project(gate or up_layer, x, kept.inner, "inner")
        up = project(up_layer, x, kept.up, "up") if gate is not None else None
        # First the product, if there is one, then its gradient, then that of up.
        outer = scratch.empty("outer", inner.shape, x.dtype, x.device)
        if up is not None and self.call.is_fused(x):
            d_inner = inner if kept.inner is None else projections.empty("d_inner", inner.shape, x.dtype, x.device)
            return self._of_silu_product(inner, up, dy, outer, d_inner)
        with torch.enable_grad():
            # Autograd is told of this chunk's tensor, not of the memory under it.
            inner = inner.detach().requires_grad_()
            activated = self.call.activation(inner)
            # The way back alone, without the value.
            edge = get_gradient_edge(activated)
        activated = activated.detach()
        if sums.down_weight.is_needed:
            product = activated if up is None else torch.mul(up, activated, out=outer)
            sums.down_weight.add_outer_products(dy, product, transposed=self.call.transposed)
            del product
        sums.down_bias.add_column_sums(dy)
        torch.mm(dy, down.weight, out=outer)
        if up is None:
            del activated
            return [*torch.autograd.grad(edge, inner, outer)]
        memory = up if kept.up is None else projections.empty("d_activated", up.shape, x.dtype, x.device)
        d_activated = torch.mul(outer, up, out=memory)
        d_up = outer.mul_(activated)
        del activated, up
        return [*torch.autograd.grad(edge, inner, d_activated), d_up]

    def _of_silu_product(self, gate: Tensor, up: Tensor, dy: Tensor, outer: Tensor, d_gate: Tensor) -> list[Tensor]:
        """The same by a kernel for the product and one for both gradients, which are written to `d_gate` and `outer`;
        the first may be `gate`."""
        from .fused import swiglu

        if self.sums.down_weight.is_needed:
            product = _fused_product(gate, up, outer)
            self.sums.down_weight.add_outer_products(dy, product, transposed=self.call.transposed)
        self.sums.down_bias.add_column_sums(dy)
        torch.mm(dy, self.layers.down.weight, out=outer)
        swiglu.backward(gate, up, outer, d_gate, outer)
        return [d_gate, outer]

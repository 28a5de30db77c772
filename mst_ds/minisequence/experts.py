"""Chunked experts: of a mixture of experts, one chunk is worked on at a time: of one expert's tokens, or, where one
product does several, all tokens of several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import ceil_divide, chunk_slices

from .chunks import (
    Linear,
    ParameterSums,
    autocast_disabled,
    cast_for_autocast,
    gradient_sums,
    require_gathered,
    unrounded_product,
)
from .grouped import (
    GroupedLinear,
    Groups,
    add_column_sums,
    add_outer_products,
    fit_grouped_products,
    has_grouped_products,
    runs_of_experts,
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
    ends: ExpertEnds | None = None,
    sums: ParameterSums | None = None,
    skips_output: bool = False,
) -> Tensor:
    """For each token the sum over its experts of `weight * down(gate(up(x)))`, worked through in chunks.

    MsT (arXiv 2407.15892) for a mixture of experts. Tokens are sorted by expert, and each expert's tokens taken in
    chunks; so an expert's weight gradient is complete when its last chunk is done, and only one expert's is held in
    fp32 (fp64 for biases). Experts whose tokens fit into one chunk share it where `has_grouped_products`. The forward
    keeps only the inputs; the backward computes the up projection again, never the down projection. The loop contains
    no collective.

    Args:
        hidden_states: (T, H).
        expert_index: (T, k), integers; each token's experts, all different. Numbers of E and above name no expert.
        expert_weights: (T, k), what the router gives them.
        up_weight: (E, U, H), with the gate in it U = 2 I.
        down_weight: (E, H, I).
        chunks: a chunk is at most 1/chunks of the T * k rows, and at most T; never shorter than 4 rows for more.
        gate: (t, U) to (t, I), elementwise over t, deterministic and not in place; differentiated by autograd.
        up_bias: (E, U) or None.
        down_bias: (E, H) or None.
        transposed: weights are (E, inputs, outputs), as in GPT-OSS.
        ends: what the host has read in the forward, where the layer is computed again.
        sums: as `chunked_mlp` has them; in fp32 for all experts.
        skips_output: as `chunked_mlp` has it.

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
    inputs = [hidden_states, expert_weights]
    given, left = ParameterSums.take(sums, [up_weight, down_weight, up_bias, down_bias], inputs)
    tensors = cast_for_autocast(hidden_states, *left)
    ends = ExpertEnds() if ends is None else ends
    call = _ExpertsCall(gate, chunks, transposed, hidden_states.dtype, skips_output, _Parameters(*given), ends)
    with autocast_disabled(hidden_states.device):
        output: Tensor = _ChunkedExperts.apply(call, expert_index, expert_weights, *tensors)
    return output


@dataclass
class ExpertEnds:
    """Where each expert's rows end, once the host has read it: in the forward, for the backward too."""

    known: list[int] | None = None


@dataclass(frozen=True)
class _ExpertsCall:
    gate: Gate
    chunks: int
    transposed: bool
    dtype: torch.dtype
    skips_output: bool
    given_sums: _Parameters
    ends: ExpertEnds


class _Parameters(NamedTuple):
    """Of all experts or of some: the tensors, or their gradients, or the sums of these."""

    up_weight: Any
    down_weight: Any
    up_bias: Any
    down_bias: Any

    def of(self, experts: int | slice) -> _Parameters:
        return _Parameters(*(tensor[experts] if tensor is not None else None for tensor in self))


class _Rows(NamedTuple):
    """A chunk of rows: which tokens they are, and where in (T, k) they stand."""

    tokens: Tensor
    places: Tensor


class _Run(NamedTuple):
    """Experts that are worked on together.

    chunks: of their rows, in the order of the tokens; several experts have one chunk.
    groups: the rows of each in the only chunk; None where there is one expert.
    """

    experts: slice
    chunks: list[_Rows]
    groups: Groups | None


def read_ends(ends: Tensor, of_tokens: torch.Size) -> list[int]:
    """Where each expert's rows end, (E,), for the host, which waits for the device here and nowhere else.

    Args:
        of_tokens: (T, k), the shape of what was counted: all that is known of it where tensors have no values.
    """
    return ends.tolist()


def _runs(call: _ExpertsCall, expert_index: Tensor, parameters: _Parameters, x: Tensor) -> Iterator[_Run]:
    """All experts that have tokens."""
    num_experts, k = len(parameters.up_weight), expert_index.shape[-1]
    ordered, order = expert_index.flatten().sort(stable=True)
    experts_in_order = torch.arange(num_experts, dtype=ordered.dtype, device=ordered.device)
    ends = torch.searchsorted(ordered, experts_in_order, right=True)
    del ordered
    if call.ends.known is None:
        call.ends.known = read_ends(ends, expert_index.shape)
    known = call.ends.known
    starts = [0, *known[:-1]]
    sizes = [end - start for start, end in zip(starts, known, strict=True)]
    longest = max(1, ceil_divide(len(order), call.chunks))
    weights = parameters.up_weight, parameters.down_weight
    is_grouped = has_grouped_products(x, *weights) and fit_grouped_products(*weights)
    # No more rows than one expert can have. With biases what comes before and after the gate is in fp32: half as many.
    most = min(longest, len(x)) // (1 if parameters.up_bias is None else 2)
    for experts in runs_of_experts(sizes, most if is_grouped else 0):
        start, count = starts[experts.start], sum(sizes[experts])
        places = order[start : start + count]
        slices = chunk_slices(count, ceil_divide(count, longest))
        groups = None
        if experts.stop - experts.start > 1:
            groups = Groups((ends[experts] - start).int(), [end - start for end in known[experts]])
        yield _Run(experts, [_Rows(places[rows] // k, places[rows]) for rows in slices], groups)


def _layers(call: _ExpertsCall, of_expert: _Parameters) -> tuple[Linear, Linear]:
    """Up and down of one expert."""
    up, down = of_expert.up_weight, of_expert.down_weight
    if call.transposed:
        up, down = up.t(), down.t()
    return Linear(up, of_expert.up_bias), Linear(down, of_expert.down_bias)


def _grouped_layers(call: _ExpertsCall, of_run: _Parameters, groups: Groups) -> tuple[GroupedLinear, GroupedLinear]:
    """Up and down of several experts."""
    up, down = of_run.up_weight, of_run.down_weight
    if call.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    return GroupedLinear(up, of_run.up_bias, groups), GroupedLinear(down, of_run.down_bias, groups)


def _compute(call: _ExpertsCall, *tensors: Tensor, out: Tensor | None = None) -> Tensor:
    total = _unrounded(call, *tensors)
    return total.to(call.dtype) if out is None else out.copy_(total)


def _unrounded(call: _ExpertsCall, expert_index: Tensor, expert_weights: Tensor, x: Tensor, *tensors: Tensor) -> Tensor:
    parameters = _Parameters(*tensors)
    total = torch.zeros_like(x, dtype=sum_dtype(x.dtype), memory_format=torch.contiguous_format)
    scores = expert_weights.flatten()
    for run in _runs(call, expert_index, parameters, x):
        for rows in run.chunks:
            result = _forward_chunk(call, run, parameters, x[rows.tokens])
            total.index_add_(0, rows.tokens, (result * scores[rows.places, None]).to(total.dtype))
    return total


def _forward_chunk(call: _ExpertsCall, run: _Run, parameters: _Parameters, x: Tensor) -> Tensor:
    """(t, H) -> (t, H), not yet weighted."""
    if run.groups is None:
        up, down = _layers(call, parameters.of(run.experts.start))
        return linear(call.gate(linear(x, *up)), *down)
    of_up, of_down = _grouped_layers(call, parameters.of(run.experts), run.groups)
    return of_down(call.gate(of_up(x)).to(x.dtype))


class _Inputs(NamedTuple):
    """Of the backward: x, dy: (T, H); scores: (T * k,)."""

    x: Tensor
    dy: Tensor
    scores: Tensor

    def of(self, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
        """(t, H), (t, H), (t, 1)."""
        return self.x[rows.tokens], self.dy[rows.tokens], self.scores[rows.places, None]


class _ChunkedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _ExpertsCall, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.call = call
        if not call.skips_output:
            return _compute(call, *tensors)
        _, _, x, *_ = tensors
        return torch.empty_like(x, dtype=call.dtype, memory_format=torch.contiguous_format)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        call: _ExpertsCall = ctx.call
        expert_index, expert_weights, x, *tensors = ctx.saved_tensors
        _, _, needs_scores, needs_x, *needs = ctx.needs_input_grad
        dtype = sum_dtype(x.dtype)
        dx = torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) if needs_x else None
        d_scores = torch.zeros(expert_weights.numel(), dtype=dtype, device=x.device) if needs_scores else None
        parameters = _Parameters(*tensors)
        # Where a sum is given, that; else in the parameters' dtype.
        grads = _Parameters(
            *(
                given.total if given is not None else torch.zeros_like(tensor) if needed else None
                for tensor, needed, given in zip(tensors, needs, call.given_sums, strict=True)
            )
        )
        inputs = _Inputs(x, grad_output, expert_weights.flatten())
        with autocast_disabled(x.device):
            for run in _runs(call, expert_index, parameters, x):
                backward = _backward_of_one if run.groups is None else _backward_of_several
                for rows, d_score, d_inner, up in backward(call, run, parameters, grads, inputs):
                    if dx is not None:
                        dx.index_add_(0, rows.tokens, up.input_gradient(d_inner).to(dtype))
                    if d_scores is not None:
                        d_scores[rows.places] = d_score
        d_weights = d_scores.view_as(expert_weights).to(expert_weights.dtype) if d_scores is not None else None
        own = (grad if given is None else None for grad, given in zip(grads, call.given_sums, strict=True))
        return None, None, d_weights, dx.to(x.dtype) if dx is not None else None, *own


# What a chunk's backward gives beside parameter gradients: its rows, the gradient of the scores, (t,), and that of the
# up projection's output, (t, U), with the up projection itself.
_OfChunk = tuple[_Rows, Tensor, Tensor, Linear | GroupedLinear]


def _backward_of_one(
    call: _ExpertsCall, run: _Run, parameters: _Parameters, grads: _Parameters, inputs: _Inputs
) -> Iterator[_OfChunk]:
    """Chunk by chunk, with parameter gradients of this expert alone in fp32."""
    of_expert = parameters.of(run.experts.start)
    up, down = _layers(call, of_expert)
    needs = [grad is not None for grad in grads]
    given = [None if total is None else total.part(run.experts.start) for total in call.given_sums]
    sums = _Parameters(*gradient_sums(of_expert, needs, given))
    for rows in run.chunks:
        yield rows, *_backward_chunk(call, up, down, sums, *inputs.of(rows)), up
    for grad, gradient, mine in zip(grads, sums, given, strict=True):
        if grad is not None and mine is None and gradient.total is not None:
            grad[run.experts.start] = gradient.total


def _backward_chunk(
    call: _ExpertsCall, up: Linear, down: Linear, sums: _Parameters, x: Tensor, dy: Tensor, scores: Tensor
) -> tuple[Tensor, Tensor]:
    """Add one chunk's parameter gradients to `sums`.

    Args:
        x, dy: (t, H); scores: (t, 1).

    Returns:
        The gradient of the scores, (t,), and that of the up projection's output, (t, U).
    """
    inner, gated = _gated(call.gate, linear(x, *up))
    product = gated.detach()
    d_product = unrounded_product(dy.to(down.weight.dtype), down.weight)
    d_score = _score_gradient(d_product, product, dy, down.bias)
    weighted = (dy * scores).to(x.dtype)
    sums.down_weight.add_outer_products(weighted, product, transposed=call.transposed)
    sums.down_bias.add_column_sums(weighted)
    (d_inner,) = torch.autograd.grad(gated, inner, (d_product * scores).to(x.dtype))
    sums.up_weight.add_outer_products(d_inner, x, transposed=call.transposed)
    sums.up_bias.add_column_sums(d_inner)
    return d_score, d_inner


def _backward_of_several(
    call: _ExpertsCall, run: _Run, parameters: _Parameters, grads: _Parameters, inputs: _Inputs
) -> Iterator[_OfChunk]:
    """In one chunk, which has all rows of these experts: each parameter gradient is one product, rounded once."""
    (rows,), groups = run.chunks, run.groups
    assert groups is not None
    up, down = _grouped_layers(call, parameters.of(run.experts), groups)
    x, dy, scores = inputs.of(rows)
    inner, gated = _gated(call.gate, up(x))
    product = gated.detach().to(x.dtype)
    d_product = down.input_gradient(dy.to(x.dtype)).to(sum_dtype(x.dtype))
    d_score = _score_gradient(d_product, product, dy, down.bias_of_rows(len(dy)))
    weighted = (dy * scores).to(x.dtype)
    (d_inner,) = torch.autograd.grad(gated, inner, (d_product * scores).to(gated.dtype))
    d_inner = d_inner.to(x.dtype)
    for grad, factors in ((grads.down_weight, (weighted, product)), (grads.up_weight, (d_inner, x))):
        if grad is not None:
            left, right = reversed(factors) if call.transposed else factors
            add_outer_products(left, right, groups, total=grad[run.experts])
    for grad, values in ((grads.down_bias, weighted), (grads.up_bias, d_inner)):
        if grad is not None:
            add_column_sums(values, groups, total=grad[run.experts])
    yield rows, d_score, d_inner, up


def _gated(gate: Gate, inner: Tensor) -> tuple[Tensor, Tensor]:
    """The up projection's output and, differentiable by it, the down projection's input."""
    with torch.enable_grad():
        return inner.requires_grad_(), gate(inner)


def _score_gradient(d_product: Tensor, product: Tensor, dy: Tensor, bias: Tensor | None) -> Tensor:
    """(t,): <dy, down(product)> without the down projection: <dy @ down, product>.

    Args:
        d_product, product: (t, I); dy: (t, H); bias: (H,) or (t, H).
    """
    d_score = (d_product * product).sum(-1)
    return d_score if bias is None else d_score + (dy * bias).sum(-1, dtype=d_score.dtype)

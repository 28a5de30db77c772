"""Weight gradients of linear layers inside a chunk, summed in fp32 without being rounded first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from .chunks import GradientSum, Linear, autocast_disabled, cast_for_autocast, flat, flat_view, hooks_put_off


class SumLinearGradients(TorchFunctionMode):
    """While active, linear layers whose parameters have sums here add to them when they are differentiated.

    Autograd would round each chunk's weight gradient to the weight's dtype, and hold it whole beside the sum. Seen are
    `torch.nn.functional.linear`, which `nn.Linear` calls, and `torch.addmm`, which GPT-2's Conv1D calls. To autograd
    the parameters have no gradient from them.
    """

    def __init__(self, sums: Sequence[GradientSum]) -> None:
        super().__init__()
        self._sums: Mapping[int, GradientSum] = {id(each.parameter): each for each in sums if each.is_needed}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            x, weight, bias = _bind(("input", "weight", "bias"), args, kwargs)
            if self._has_sums_for(weight, bias):
                return self._apply(x, weight, bias, transposed=False)
        if func is torch.addmm and len(args) == 3 and not kwargs and self._has_sums_for(args[2], args[0]):
            bias, x, weight = args
            return self._apply(x, weight, bias, transposed=True)
        return func(*args, **kwargs)

    def _has_sums_for(self, weight: Tensor, bias: Tensor | None) -> bool:
        # A weight or bias that is computed, as by a parametrization, has a gradient that must go on.
        wanted = [tensor for tensor in (weight, bias) if tensor is not None and tensor.requires_grad]
        return bool(wanted) and all(id(tensor) in self._sums for tensor in wanted) and weight.dim() == 2

    def _apply(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, transposed: bool) -> Any:
        sums = self._sums.get(id(weight)), self._sums.get(id(bias))
        return _LinearIntoSums.apply(x, weight, bias, transposed, *sums)


def _bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return [*args, *(kwargs.get(name) for name in names[len(args) :])]


def differentiate(
    output: Tensor,
    d_output: Tensor,
    inputs: Sequence[Tensor],
    d_inputs: Sequence[Tensor | None],
    sums: Sequence[GradientSum],
) -> None:
    """Differentiate a chunk's output: write the gradients of `inputs` to `d_inputs`, where one is wanted, and add to
    `sums` those that its linear layers do not add themselves."""
    wanted = [(leaf, grad) for leaf, grad in zip(inputs, d_inputs, strict=True) if grad is not None]
    needed = [gradient for gradient in sums if gradient.is_needed]
    leaves: list[Any] = [*(leaf for leaf, _ in wanted), *(gradient.parameter for gradient in needed)]
    parts: Sequence[Tensor | None] = (None,) * len(leaves)
    if output.requires_grad:
        with hooks_put_off(gradient.parameter for gradient in needed if gradient.parameter is not None):
            parts = torch.autograd.grad(output, leaves, d_output, allow_unused=True)
    for (_, grad), part in zip(wanted, parts[: len(wanted)], strict=True):
        grad.zero_() if part is None else grad.copy_(part.reshape(grad.shape))
    for gradient, part in zip(needed, parts[len(wanted) :], strict=True):
        if part is not None:
            gradient.add(part)


class _LinearIntoSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        d_weight: GradientSum | None,
        d_bias: GradientSum | None,
    ) -> Tensor:
        x, weight, bias = cast_for_autocast(x, weight, bias)
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.sums = transposed, (d_weight, d_bias)
        layer = Linear(weight.t() if transposed else weight, bias)
        # Not a view, as a linear layer's output may be: an activation may write over it in place.
        out = x.new_empty(*x.shape[:-1], len(layer.weight))
        with autocast_disabled(x.device):
            layer.write(flat(x), out=flat_view(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_weight, d_bias = ctx.sums
        rows, d_rows = flat(x), flat(dy)
        with autocast_disabled(x.device):
            if d_weight is not None:
                d_weight.add_outer_products(d_rows, rows, transposed=ctx.transposed)
            if d_bias is not None:
                d_bias.add_column_sums(d_rows)
            dx = dy @ (weight.t() if ctx.transposed else weight) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None

"""Weight gradients of linear layers inside a chunk, summed in fp32 without being rounded first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from .chunks import add_column_sums, add_outer_products, autocast_disabled, cast_for_autocast


class SumLinearGradients(TorchFunctionMode):
    """While active, linear layers whose parameters have sums here add to them when they are differentiated.

    Autograd would round each chunk's weight gradient to the weight's dtype, and hold it whole beside the sum. Seen are
    `torch.nn.functional.linear`, which `nn.Linear` calls, and `torch.addmm`, which GPT-2's Conv1D calls. To autograd
    the parameters have no gradient from them.
    """

    def __init__(self, sums: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._sums: Mapping[int, Tensor] = {id(parameter): total for parameter, total in sums}

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


def gradients_of(output: Tensor, wanted: Sequence[Tensor], grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a chunk's output, None for what it does not use and for what linear layers have added."""
    if not output.requires_grad:
        return (None,) * len(wanted)
    return torch.autograd.grad(output, wanted, grad_output, allow_unused=True)


class _LinearIntoSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        transposed: bool,
        d_weight: Tensor | None,
        d_bias: Tensor | None,
    ) -> Tensor:
        x, weight, bias = (cast_for_autocast(tensor, x.device) for tensor in (x, weight, bias))  # type: ignore[assignment]
        ctx.save_for_backward(x, weight)
        ctx.transposed, ctx.sums = transposed, (d_weight, d_bias)
        if not transposed:
            weight = weight.t()
        # Not a view, as a linear layer's output may be: an activation may write over it in place.
        out = x.new_empty(*x.shape[:-1], weight.shape[1])
        rows = x.reshape(-1, x.shape[-1])
        with autocast_disabled(x.device):
            if bias is None:
                torch.mm(rows, weight, out=out.view(-1, weight.shape[1]))
            else:
                torch.addmm(bias, rows, weight, out=out.view(-1, weight.shape[1]))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        d_weight, d_bias = ctx.sums
        rows, d_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        with autocast_disabled(x.device):
            if d_weight is not None:
                add_outer_products(d_weight, *((rows, d_rows) if ctx.transposed else (d_rows, rows)))
            if d_bias is not None:
                add_column_sums(d_bias, d_rows)
            dx = dy @ (weight.t() if ctx.transposed else weight) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, None

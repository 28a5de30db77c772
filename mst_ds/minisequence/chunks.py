"""What every chunked operator repeats: its call, a linear layer in a chunk, gradients summed over chunks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import ELEMENTS_IN_CACHE_OF_CPU, ELEMENTS_THAT_KEEP_BUSY, ceil_divide, chunk_slices


def chunks_in_cache(tensor: Tensor) -> int:
    """Into how many chunks elementwise work on (..., C) is best divided, whatever the memory allows."""
    elements = ELEMENTS_IN_CACHE_OF_CPU if tensor.device.type == "cpu" else ELEMENTS_THAT_KEEP_BUSY
    return max(1, ceil_divide(tensor.numel(), elements))


def slices_in_cache(tensor: Tensor) -> Iterator[slice]:
    """Slices of the rows of (T, C) for elementwise work."""
    return chunk_slices(tensor.shape[0], chunks_in_cache(tensor))


class Call(Protocol):
    """What one call of an operator is told beside tensors."""

    @property
    def is_recomputing(self) -> bool:
        """Whether torch.utils.checkpoint computes the layer again."""


def call_operator(
    function: type[torch.autograd.Function], compute: Callable[..., Tensor], call: Call, *tensors: Tensor | None
) -> Tensor:
    """`function.apply(call, *tensors)`, an output with a gradient.

    A recompute ends with the last tensor that is saved for the layer's backward, at the end of `apply`, if that is the
    last operator. So `function` leaves its output empty then, and it is computed only where the layer goes on:
    `compute(call, *tensors, out=output)` writes it.
    """
    output: Tensor = function.apply(call, *tensors)
    if call.is_recomputing:
        with torch.no_grad():
            compute(call, *tensors, out=output)
    return output


def flat(tensor: Tensor) -> Tensor:
    """(..., C) as (tokens, C), to be read: a copy, where its layout has no such view."""
    return tensor.reshape(-1, tensor.shape[-1])


def flat_view(tensor: Tensor) -> Tensor:
    """(..., C) as (tokens, C), to be written to: never a copy, in which what is written would be lost."""
    return tensor.view(-1, tensor.shape[-1])


class Linear(NamedTuple):
    """A linear layer: its weight, (outputs, inputs), and bias."""

    weight: Tensor
    bias: Tensor | None

    def write(self, x: Tensor, out: Tensor) -> Tensor:
        """Of (T, inputs). One operation: a bias that is added afterwards rounds 16 bits twice."""
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """(T, outputs) -> (T, inputs)."""
        return torch.mm(dy, self.weight)


class Scratch:
    """Memory that each chunk uses again: fresh memory costs a CPU as much time as a tenth of the product it takes."""

    def __init__(self) -> None:
        self._tensors: dict[str, Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor of `shape`, (rows, columns), in which stands what was last put under this name."""
        known = self._tensors.get(name)
        if known is None or known.shape[0] < shape[0]:
            known = self._tensors[name] = torch.empty(*shape, dtype=dtype, device=device)
        return known[: shape[0]]


class GradientSum:
    """The gradient of a parameter: summed over chunks in fp32 at least, of a vector in fp64, and rounded once.

    A bias gradient is a bare sum. In fp32 its running total would be rounded at every chunk, which one sum over all
    tokens is not: twice the error of the unchunked gradient at 256 chunks.

    Args:
        parameter: of any floating dtype; None where an operator is used without it.
        is_needed: if not, `total` is None, and nothing is added.
        transposed: a weight is (inputs, outputs), and products are added to it as if it were (outputs, inputs).
    """

    def __init__(self, parameter: Tensor | None, is_needed: bool, *, transposed: bool = False) -> None:
        self.parameter, self.transposed = parameter, transposed
        self.is_needed = is_needed and parameter is not None
        self._total: Tensor | None = None

    @property
    def total(self) -> Tensor | None:
        """What was added so far."""
        if self._total is None and self.is_needed and self.parameter is not None:
            self._total = torch.zeros_like(self.parameter, dtype=self._dtype, memory_format=torch.contiguous_format)
        return self._total

    @property
    def _dtype(self) -> torch.dtype:
        assert self.parameter is not None
        return torch.float64 if self.parameter.dim() == 1 else sum_dtype(self.parameter.dtype)

    def add_outer_products(self, left: Tensor, right: Tensor) -> None:
        """Add `left.T @ right`, (T, outputs) and (T, inputs) of any floating dtypes, not rounded to 16 bits first.

        The first product is written, not added to zeros: in one chunk, that saves all the sum's own memory traffic.
        """
        if not self.is_needed:
            return
        if self.transposed:
            left, right = right, left
        dtype = self._dtype
        is_wider = left.dtype == right.dtype != dtype
        has = products_in_fp32(left.device, left.dtype) if is_wider else ProductsInFp32()
        if self._total is None and (has.alone or not has.added):
            factors = (left.t(), right) if has.alone else (left.to(dtype).t(), right.to(dtype))
            self._total = torch.mm(*factors, out_dtype=dtype) if has.alone else torch.mm(*factors)
            return
        total = self.total
        assert total is not None
        if has.added:
            torch.addmm(total, left.t(), right, out_dtype=dtype, out=total)
        elif has.alone:
            total += torch.mm(left.t(), right, out_dtype=dtype)
        else:
            total.addmm_(left.to(dtype).t(), right.to(dtype))

    def add_column_sums(self, values: Tensor) -> None:
        """Add `values.sum(0)`, of (T, M) in any floating dtype, itself summed in fp32 at least."""
        if (total := self.total) is not None:
            total += values.sum(0, dtype=sum_dtype(values.dtype))

    def add(self, part: Tensor) -> None:
        """Add a chunk's gradient as it is."""
        if (total := self.total) is not None:
            total.add_(part)

    def rounded(self) -> Tensor | None:
        """The gradient in the parameter's dtype; None where it is not needed."""
        total = self.total
        return total.to(self.parameter.dtype) if total is not None and self.parameter is not None else None


def gradient_sums(
    parameters: Iterable[Tensor | None], needs: Iterable[bool], *, transposed: bool = False
) -> list[GradientSum]:
    """One for each parameter, of which `needs` says whether it needs one."""
    return [GradientSum(*pair, transposed=transposed) for pair in zip(parameters, needs, strict=True)]


def unrounded_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right` in fp32 at least, also for 16-bit operands: (T, M), (M, N) -> (T, N)."""
    dtype = sum_dtype(left.dtype)
    if left.dtype == right.dtype != dtype and products_in_fp32(left.device, left.dtype).alone:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype))


class ProductsInFp32(NamedTuple):
    """Which products of 16-bit matrices a device gives in fp32, without copies of the factors."""

    added: bool = False  # to an fp32 matrix: torch.addmm, which in torch 2.9 wants a matrix of 16 bits
    alone: bool = False  # torch.mm


@functools.cache
def products_in_fp32(device: torch.device, dtype: torch.dtype) -> ProductsInFp32:
    """Asked of the device once: they are CUDA's, and older builds of torch lack them."""
    if device.type != "cuda":
        return ProductsInFp32()
    total, ones = torch.ones(16, 16, device=device), torch.ones(16, 16, device=device, dtype=dtype)

    def gives(expected: float, product: Callable[[], Tensor]) -> bool:
        try:
            found = product()
        except (RuntimeError, TypeError):
            return False
        return found.dtype == torch.float32 and bool((found == expected).all())

    found = ProductsInFp32(
        added=gives(17, lambda: torch.addmm(total, ones.t(), ones, out_dtype=torch.float32, out=total)),
        alone=gives(16, lambda: torch.mm(ones.t(), ones, out_dtype=torch.float32)),
    )
    if not any(found):
        warnings.warn(
            f"torch {torch.__version__} has no product of {dtype} matrices in fp32 on {device}: weight gradients are "
            "computed from fp32 copies, which takes about twice as long; use torch 2.10 or newer",
            stacklevel=2,
        )
    return found


def autocast_disabled(device: torch.device) -> AbstractContextManager[None]:
    """Operators choose each product's dtype themselves; autocast inside them would round accumulators."""
    return torch.autocast(device.type, enabled=False)


def cast_for_autocast(x: Tensor, *parameters: Tensor | None) -> list[Any]:
    """Do what autocast does to a linear layer's inputs, differentiably."""
    if not torch.is_autocast_enabled(x.device.type):
        return [x, *parameters]
    dtype = torch.get_autocast_dtype(x.device.type)
    tensors = (x, *parameters)
    return [each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in tensors]


def require_gathered(name: str, weight: Tensor) -> None:
    """Raise a readable error for a ZeRO-3 placeholder, instead of a shape mismatch deep inside a matmul.

    Raises:
        ValueError: `weight` has no elements.
    """
    if weight.numel() == 0:
        raise ValueError(
            f"{name} has no elements: ZeRO-3 has not gathered it; call mst_ds.apply_plan with a ZeRO-3 plan "
            "before deepspeed.initialize"
        )

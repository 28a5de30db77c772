"""What every chunked operator repeats: its call, a linear layer in a chunk, gradients summed over chunks."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

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
    """

    def __init__(self, parameter: Tensor | None, is_needed: bool) -> None:
        self.parameter = parameter
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

    def part(self, index: int) -> GradientSum:
        """Of `parameter[index]`; what is added to it is added to this."""
        assert self.parameter is not None
        part = GradientSum(self.parameter[index], self.is_needed)
        part._total = self.total[index] if self.total is not None else None
        return part

    def add_outer_products(self, left: Tensor, right: Tensor, *, transposed: bool = False) -> None:
        """Add `left.T @ right`, (T, outputs) and (T, inputs) of any floating dtypes, not rounded to 16 bits first.

        The first product is written, not added to zeros: in one chunk, that saves all the sum's own memory traffic.

        Args:
            transposed: the weight is (inputs, outputs).
        """
        if not self.is_needed:
            return
        if transposed:
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
        """The gradient in the parameter's dtype; None where it is not needed. The sum is given up."""
        total, self._total = self.total, None
        return total.to(self.parameter.dtype) if total is not None and self.parameter is not None else None


def gradient_sums(
    parameters: Iterable[Tensor | None], needs: Iterable[bool], given: Iterable[GradientSum | None] | None = None
) -> list[GradientSum]:
    """One for each parameter, of which `needs` says whether it needs one; where one is given it is that."""
    made = [GradientSum(*pair) for pair in zip(parameters, needs, strict=True)]
    return made if given is None else [mine or own for mine, own in zip(given, made, strict=True)]


def rounded_own(sums: Iterable[GradientSum], given: Iterable[GradientSum | None]) -> list[Tensor | None]:
    """The gradients that leave an operator: those whose sum was not given to it."""
    return [each.rounded() if mine is None else None for each, mine in zip(sums, given, strict=True)]


class ParameterSums:
    """The sums of a layer's parameters over several calls of its operators, which add to them in their backwards.

    An operator that finds one for its parameter leaves it out of autograd, which would round each call's gradient.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.sums = [GradientSum(parameter, parameter.requires_grad) for parameter in parameters]
        self._by_parameter = {id(each.parameter): each for each in self.sums if each.is_needed}

    def find(self, parameter: Tensor | None) -> GradientSum | None:
        """None where it is no parameter of the layer, such as one that is computed of others, or is not trained."""
        return self._by_parameter.get(id(parameter))

    @staticmethod
    def take(
        sums: ParameterSums | None, parameters: Iterable[Tensor | None], inputs: Iterable[Tensor]
    ) -> tuple[list[GradientSum | None], list[Tensor | None]]:
        """The sum of each parameter, None where there is none, and the parameters, without a gradient where there is
        one. Where no input has a gradient there is none: nothing else would lead autograd to the operator."""
        if not any(tensor.requires_grad for tensor in inputs):
            sums = None
        found = [(None if sums is None else sums.find(each), each) for each in parameters]
        left = [each.detach() if each is not None and total is not None else each for total, each in found]
        return [total for total, _ in found], left


@contextmanager
def hooks_put_off(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within, autograd runs no hook of these parameters, which are for the whole gradient and not for a chunk's."""
    hooks = [(each, each._backward_hooks) for each in parameters if each._backward_hooks]
    for parameter, _ in hooks:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, of_parameter in hooks:
            parameter._backward_hooks = of_parameter


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


def forget_casts(device: torch.device) -> None:
    """torch 2.9 keeps casts of weights that were made without gradients, and would use them in the backward."""
    if torch.is_autocast_enabled(device.type):
        torch.clear_autocast_cache()


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

"""What every chunked operator shares: into how many chunks elementwise work goes, and how gradients add up."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import ELEMENTS_IN_CACHE_OF_CPU, ELEMENTS_THAT_KEEP_BUSY, ceil_divide, chunk_slices


def chunks_in_cache(tensor: torch.Tensor) -> int:
    """Into how many chunks elementwise work on (..., C) is best divided, whatever the memory allows."""
    elements = ELEMENTS_IN_CACHE_OF_CPU if tensor.device.type == "cpu" else ELEMENTS_THAT_KEEP_BUSY
    return max(1, ceil_divide(tensor.numel(), elements))


def slices_in_cache(tensor: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of (T, C) for elementwise work."""
    return chunk_slices(tensor.shape[0], chunks_in_cache(tensor))


class Scratch:
    """Memory that each chunk uses again: fresh memory costs a CPU as much time as a tenth of the product it takes."""

    def __init__(self) -> None:
        self._tensors: dict[str, torch.Tensor] = {}

    def empty(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor of `shape`, (rows, columns), in which stands what was last put under this name."""
        known = self._tensors.get(name)
        if known is None or known.shape[0] < shape[0]:
            known = self._tensors[name] = torch.empty(*shape, dtype=dtype, device=device)
        return known[: shape[0]]


def zeros_for_accumulation(parameter: torch.Tensor) -> torch.Tensor:
    """A zero accumulator for the gradient of `parameter`: in `sum_dtype`, for a bias (one vector) in fp64.

    A bias gradient is a bare sum. In fp32 its running total would be rounded at every chunk, which one sum over all
    tokens is not: twice the error of the unchunked gradient at 256 chunks.
    """
    dtype = torch.float64 if parameter.dim() == 1 else sum_dtype(parameter.dtype)
    return torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)


def add_column_sums(accumulator: torch.Tensor, values: torch.Tensor) -> None:
    """`accumulator += values.sum(0)`, the sum in fp32 at least.

    Args:
        accumulator: (M,).
        values: (T, M), any floating dtype.
    """
    accumulator += values.sum(0, dtype=sum_dtype(values.dtype))


def add_outer_products(accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`accumulator += left.T @ right` without rounding the product to a 16-bit dtype first.

    Args:
        accumulator: (M, N) in the accumulation dtype.
        left: (T, M), any floating dtype.
        right: (T, N), any floating dtype.
    """
    if not accumulator.is_contiguous():  # the view of a transposed weight
        accumulator, left, right = accumulator.t(), right, left
    needs_out_dtype = left.dtype == right.dtype != accumulator.dtype and accumulator.is_contiguous()
    if needs_out_dtype and _gemm_accumulates_in_fp32(left.device, left.dtype):
        torch.addmm(accumulator, left.t(), right, out_dtype=accumulator.dtype, out=accumulator)
    else:
        accumulator.addmm_(left.to(accumulator.dtype).t(), right.to(accumulator.dtype))


def unrounded_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """`left @ right` in fp32 at least, also for 16-bit operands: (T, M), (M, N) -> (T, N)."""
    dtype = sum_dtype(left.dtype)
    if left.dtype == right.dtype != dtype and _gemm_accumulates_in_fp32(left.device, left.dtype):
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left.to(dtype), right.to(dtype))


@functools.cache
def _gemm_accumulates_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    # 16-bit inputs with an fp32 result are a CUDA GEMM, absent on other devices and in older builds: asked once.
    if device.type != "cuda":
        return False
    total = torch.ones(16, 16, device=device)
    ones = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.addmm(total, ones.t(), ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def autocast_disabled(device: torch.device) -> AbstractContextManager[None]:
    """Operators choose each product's dtype themselves; autocast inside them would round accumulators."""
    return torch.autocast(device.type, enabled=False)


def cast_for_autocast(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Do what autocast does to a linear layer's inputs, differentiably."""
    if tensor is None or not torch.is_autocast_enabled(device.type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device.type))


def require_gathered(name: str, weight: torch.Tensor) -> None:
    """Raise a readable error for a ZeRO-3 placeholder, instead of a shape mismatch deep inside a matmul.

    Raises:
        ValueError: `weight` has no elements.
    """
    if weight.numel() == 0:
        raise ValueError(
            f"{name} has no elements: ZeRO-3 has not gathered it; call mst_ds.apply_plan with a ZeRO-3 plan "
            "before deepspeed.initialize"
        )

"""Linear layers of several experts at a time: one product, however many experts there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import EXPERTS_OF_A_GRADIENT

# Matrices and their rows begin at multiples of 16 bytes in the grouped kernels: so many elements of 16 bits.
_ALIGNED = 8
# They take fewer than 1024 groups.
_MOST_GROUPS = 1023


def has_grouped_products(*tensors: Tensor) -> bool:
    """Whether the device multiplies groups of rows by a matrix each without telling the host how long they are: torch
    does in bf16 on compute capabilities 9 and 10; on others it would wait for the device and go group by group.

    Args:
        tensors: the rows and the matrices (groups, M, N).
    """
    first = tensors[0]
    if first.device.type != "cuda" or any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        return False
    if not hasattr(torch.nn.functional, "grouped_mm"):  # torch 2.9
        return False
    return torch.cuda.get_device_capability(first.device)[0] in (9, 10)


def fit_grouped_products(*matrices: Tensor) -> bool:
    """Whether the grouped kernels take these matrices, (groups, M, N), as they lie in memory."""
    return all(
        matrix.is_contiguous()
        and matrix.shape[1] % _ALIGNED == matrix.shape[2] % _ALIGNED == matrix.storage_offset() % _ALIGNED == 0
        for matrix in matrices
    )


def runs_of_experts(sizes: list[int], most: int) -> list[slice]:
    """Experts that are worked on together: consecutive ones, none without rows, with at most `most` rows in all; one
    that has more stands alone.

    Without rows a weight gradient would be a sum over nothing, for which not every release of the kernel writes zeros.
    """
    runs: list[slice] = []
    rows = 0
    for expert, size in enumerate(sizes):
        if not size:
            continue
        if runs and runs[-1].stop == expert and rows + size <= most and expert - runs[-1].start < _MOST_GROUPS:
            rows += size
            runs[-1] = slice(runs[-1].start, expert + 1)
        else:
            rows = size
            runs.append(slice(expert, expert + 1))
    return runs


@dataclass(frozen=True)
class Groups:
    """Consecutive rows that belong together.

    Args:
        ends: (groups,), int32: where each group's rows end; the last is their number.
        ends_on_host: the same.
    """

    ends: Tensor
    ends_on_host: list[int]

    def parts(self, most: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """At most so many groups at a time: which they are, their rows, and where these end, from their own first."""
        count = len(self.ends_on_host)
        start = 0
        for first in range(0, count, most):
            groups = slice(first, min(first + most, count))
            stop = self.ends_on_host[groups.stop - 1]
            yield groups, slice(start, stop), self.ends[groups] - start
            start = stop


@dataclass(frozen=True)
class GroupedLinear:
    """One linear layer for each group of rows.

    Args:
        weight: (groups, outputs, inputs).
        bias: (groups, outputs) or None.
    """

    weight: Tensor
    bias: Tensor | None
    groups: Groups

    def __call__(self, x: Tensor) -> Tensor:
        """(t, inputs) -> (t, outputs); with a bias in fp32, since the product is rounded before the bias is added and a
        sum rounded again would have more than the error budget."""
        output = torch.nn.functional.grouped_mm(x, self.weight.transpose(1, 2), offs=self.groups.ends)
        bias = self.bias_of_rows(len(x))
        return output if bias is None else output + bias.to(sum_dtype(x.dtype))

    def input_gradient(self, dy: Tensor) -> Tensor:
        """(t, outputs) -> (t, inputs)."""
        return torch.nn.functional.grouped_mm(dy, self.weight, offs=self.groups.ends)

    def bias_of_rows(self, rows: int) -> Tensor | None:
        """(t, outputs)."""
        if self.bias is None:
            return None
        ends = self.groups.ends
        return self.bias[torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)]


def add_outer_products(left: Tensor, right: Tensor, groups: Groups, total: Tensor) -> None:
    """Add for each group `left.T @ right`, summed in fp32 and rounded once: (t, M), (t, N) -> (groups, M, N)."""
    for part, rows, ends in groups.parts(EXPERTS_OF_A_GRADIENT):
        total[part] += torch.nn.functional.grouped_mm(left[rows].t(), right[rows], offs=ends)


def add_column_sums(values: Tensor, groups: Groups, total: Tensor) -> None:
    """Add for each group the sum of its rows, in fp32 and rounded once: (t, M) -> (groups, M)."""
    ones = values.new_ones(len(values), _ALIGNED)
    total += torch.nn.functional.grouped_mm(ones.t(), values, offs=groups.ends)[:, 0]

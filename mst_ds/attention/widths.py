"""Heads of one width, which kernels want, where a layer's values are wider or narrower than its keys."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

from mst_ds.geometry import ceil_divide

# Kernels on CUDA want heads of one width, a multiple of this.
_WIDTH = 8


def common_width(query: Tensor, value: Tensor) -> int:
    width = max(query.shape[3], value.shape[3])
    return ceil_divide(width, _WIDTH) * _WIDTH if query.is_cuda else width


def widened(tensor: Tensor, width: int) -> Tensor:
    if tensor.shape[3] < width:
        return pad(tensor, (0, width - tensor.shape[3]))
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()

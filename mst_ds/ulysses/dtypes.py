"""In which dtype attention sums."""

from __future__ import annotations

import torch


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """For sums of numbers in `dtype`: never below fp32."""
    return torch.promote_types(dtype, torch.float32)

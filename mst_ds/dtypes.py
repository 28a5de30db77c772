"""The dtypes of a model by the names that the DeepSpeed JSON, plans and checkpoints have; and that of sums."""

from __future__ import annotations

from collections.abc import Mapping

import torch

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALVES = frozenset({torch.float16, torch.bfloat16})


def dtype_name(dtype: torch.dtype) -> str:
    """The short name, or torch's where there is none."""
    names = {value: name for name, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """For sums of numbers in `dtype`, such as gradients over chunks: never below fp32."""
    return torch.promote_types(dtype, torch.float32)

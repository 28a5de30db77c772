"""Counts matrix products, the measure of what is computed and what is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}

_BATCHED = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}


class CountProducts(TorchDispatchMode):
    """Counts products of two matrices by the shape of their result, in `shapes`."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:  # type: ignore[attr-defined]
            self.shapes[tuple(result.shape)] += 1
        return result


class CountMultiplications(TorchDispatchMode):
    """Counts what products of matrices multiply, in `multiplications`."""

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket  # type: ignore[attr-defined]
        if packet in _PRODUCTS or packet in _BATCHED:
            # The last of two matrices, behind a tensor that their product is added to.
            matrices = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.multiplications += result.numel() * matrices[0].shape[-1]
        return result

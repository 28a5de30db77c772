"""Random numbers that no config field switches off, such as a router's noise: the same one each time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from mst_ds.structure.probe import DispatchMode

# Of each element by itself, so that chunks and shards draw what they would of the whole.
_VALUES: Mapping[Any, Callable[..., float]] = {
    torch.ops.aten.exponential_.default: lambda tensor, lambd=1.0, **_: 1.0 / lambd,
    torch.ops.aten.uniform_.default: lambda tensor, low=0.0, high=1.0, **_: (low + high) / 2,
    torch.ops.aten.rand_like.default: lambda tensor, **_: 0.5,
}


class SettledNumbers(DispatchMode):
    """Inside this context each number of these distributions is the mean of its distribution, and none is drawn.

    Two runs of a model draw different numbers, so that they could not be compared. What is left to draw, such as a
    dropout, is drawn, and a preflight refuses that.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        value = _VALUES.get(func)
        if value is None:
            return func(*args, **kwargs)
        tensor = args[0]
        mean = value(*args, **kwargs)
        return torch.full_like(tensor, mean) if func is torch.ops.aten.rand_like.default else tensor.fill_(mean)

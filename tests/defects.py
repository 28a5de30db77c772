"""Defects put into an operator, which a check has to find."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor


def with_scaled_gradient(tensor: Any, factor: float) -> Any:
    """The same values, whose gradient comes out `factor` times too large."""
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        tensor = tensor.view_as(tensor)  # the hook is of this use alone, not of a parameter
        tensor.register_hook(lambda gradient: gradient * factor)
    return tensor


def scale_gradient(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    operator: str,
    where: Callable[[Tensor], bool],
    *,
    factor: float = 1.001,
) -> None:
    """Let `operator`, as `module` calls it, return the gradients of some of its tensors `factor` times too large.

    Choose `where` so that none of the stand-ins with which a plan is applied is meant: there it would be noticed.
    """
    right = getattr(module, operator)

    def off(value: Any) -> Any:
        return with_scaled_gradient(value, factor) if isinstance(value, Tensor) and where(value) else value

    def scaled(*args: Any, **kwargs: Any) -> Any:
        return right(*map(off, args), **{name: off(value) for name, value in kwargs.items()})

    monkeypatch.setattr(module, operator, scaled)

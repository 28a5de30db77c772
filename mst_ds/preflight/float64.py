"""Truly float64: what asks for float32 gets float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mst_ds.structure.probe import DispatchMode


class Float64(DispatchMode):
    """Inside this context every operation that asks for float32 computes in float64.

    transformers computes norms, rotary embeddings, softmax and the loss in float32 in any model, also in a float64
    one: rounding to float32 turns a difference in the last bit into one of 6e-8, under which a real defect can hide.
    With all of it in float64 two ways to compute the same agree to about 1e-15.

    A dispatch mode, since that is active in the backward and in its recompute as well. It holds for the thread that
    enters it.
    """

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(_widened, args), **{name: _widened(value) for name, value in (kwargs or {}).items()})


def _widened(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


@contextmanager
def default_float64() -> Iterator[None]:
    """What asks for no dtype, such as an integer times a fraction, gets float64 too. It holds for all threads."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)

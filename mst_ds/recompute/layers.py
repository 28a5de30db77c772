"""Recompute of a decoder layer: its input is kept, and what its operators ask to be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .stores import DeviceStore, Kept, LayerStore, Store

T = TypeVar("T")


class LayerCall:
    """One call of a decoder layer, from its forward to the end of its backward.

    Operators inside the layer see the same call when they are computed for the first time and when they are computed
    again, and leave in it what they know. Attributes:
        store: where tensors are kept.
        is_recomputing: whether the layer is being computed again.
    """

    def __init__(self, store: LayerStore) -> None:
        self.store = store
        self.is_recomputing = False
        self._notes: list[Any] = []
        self._read = 0

    def begin_again(self) -> None:
        """The layer is computed again: notes are given in the order in which they were made."""
        self.is_recomputing, self._read = True, 0

    def note(self, make: Callable[[], T]) -> T:
        """`make()` in the forward; what that returned when the same operator is computed again."""
        if not self.is_recomputing:
            self._notes.append(make())
            return self._notes[-1]
        self._read += 1
        return self._notes[self._read - 1]


class LayerRecompute:
    """How the decoder layers of one model are computed again. `call` is the layer call that runs, None outside one."""

    def __init__(self, *, keep_attention: bool, store: Store | None = None) -> None:
        self.keep_attention = keep_attention
        self.call: LayerCall | None = None
        self._store = DeviceStore() if store is None else store

    def begin_forward(self) -> None:
        """A forward of the model begins."""
        self._store.begin_forward()

    @property
    def is_recomputing(self) -> bool:
        """Whether the operator that asks is being computed again."""
        return self.call is not None and self.call.is_recomputing

    def run_layer(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(*args)`, a layer's forward, of which its inputs are kept; torch's generators and autocast are set
        again when it is computed again. It has the form that transformers calls for recompute.
        """
        if not torch.is_grad_enabled():
            return function(*args)
        call = LayerCall(self._store.begin_layer())

        def take(kept: Kept) -> Tensor:
            call.store.begin_backward()
            return kept.take()

        with saved_tensors_hooks(call.store.keep, take):
            return checkpoint(
                function,
                *args,
                use_reentrant=False,
                context_fn=lambda: (self._entered(call), self._entered_again(call)),
            )

    @contextmanager
    def _entered(self, call: LayerCall) -> Iterator[None]:
        outer, self.call = self.call, call
        try:
            yield
        finally:
            self.call = outer

    @contextmanager
    def _entered_again(self, call: LayerCall) -> Iterator[None]:
        call.begin_again()
        with self._entered(call):
            yield

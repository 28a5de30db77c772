"""A meter of live tensor bytes, for benchmarks and tests: works on the CPU, on an accelerator and on fake tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_GET_DEVICE = torch.ops.prim.device.default


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of every storage that is made while the meter is on, for as long as the storage lives.

    Views share their storage and in-place operations keep theirs: neither counts twice. What existed before is not
    counted, also where an operation writes to it. What a single kernel allocates and frees internally is not seen.

    Attributes:
        live: bytes alive now.
        peak: the most bytes alive at once since the start, or since `reset_peak`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._leaves_out = False
        # By the address of the Python object, which cannot be another's while the weak reference lives.
        self._counted: dict[int, tuple[weakref.ref, int]] = {}
        self._existing: dict[int, weakref.ref] = {}

    def reset_peak(self) -> None:
        """Start a new phase: forget the peak, keep what is alive."""
        self.peak = self.live

    @contextmanager
    def leave_out(self) -> Iterator[None]:
        """Storages that are made within are never counted."""
        self._leaves_out = True
        try:
            yield
        finally:
            self._leaves_out = False

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is _GET_DEVICE:  # more than half of all calls on fake tensors, and none of them makes a tensor
            return func(*args)
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if id(storage) not in self._counted:
                self._exists(storage)
        result = func(*args, **kwargs)
        # Arguments too: `out=` may have resized one.
        for storage in _storages((result, args, kwargs)):
            if self._leaves_out and id(storage) not in self._counted:
                self._exists(storage)
            elif id(storage) not in self._existing:
                self._count(storage)
        self.peak = max(self.peak, self.live)
        return result

    def _exists(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self._existing:
            self._existing[id(storage)] = weakref.ref(storage, self._forgetter(id(storage)))

    def _count(self, storage: torch.UntypedStorage) -> None:
        known = self._counted.get(id(storage))
        reference = known[0] if known else weakref.ref(storage, self._forgetter(id(storage)))
        self.live += storage.nbytes() - (known[1] if known else 0)
        self._counted[id(storage)] = (reference, storage.nbytes())

    def _forgetter(self, key: int) -> Callable[[weakref.ref], None]:
        def forget(_: weakref.ref) -> None:
            if self._existing.pop(key, None) is None:
                self.live -= self._counted.pop(key)[1]

        return forget


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Of tensors in tuples, lists and dicts, which operators take and return; torch's own pytree takes far longer."""
    if isinstance(values, torch.Tensor):
        # A tensor on the meta device has no memory, though its storage says so many bytes; a fake one has another
        # device.
        if values.device.type != "meta":
            yield values.untyped_storage()
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from _storages(value)
    elif isinstance(values, dict):
        for value in values.values():
            yield from _storages(value)

"""Where tensors lie between a layer's forward and its backward: on the device, or on the host."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any, Protocol

import torch
from torch import Tensor

# Less than this stays on the device: random seeds and the like.
_SMALLEST = 4096


class Kept(Protocol):
    """A tensor that is kept for the backward."""

    def take(self) -> Tensor:
        """The tensor, on its device. It is kept no longer: a second call is an error."""


class Store(Protocol):
    """Keeps tensors from the forward for the backward. One for each model."""

    def begin_forward(self) -> None:
        """A forward of the model begins: layers before it have nothing to do with those that follow."""

    def begin_layer(self) -> LayerStore:
        """A layer's forward begins."""


class LayerStore(Protocol):
    """What one layer keeps."""

    def keep(self, tensor: Tensor) -> Kept:
        """Keep a tensor, which nobody writes to before it is taken."""

    def begin_backward(self) -> None:
        """The layer's backward begins: it will take what it kept, and the layer before it soon, too."""


class DeviceStore:
    """Keeps tensors where they are."""

    def begin_forward(self) -> None:
        """Nothing to do."""

    def begin_layer(self) -> LayerStore:
        return _OnDevice()


class _OnDevice:
    def keep(self, tensor: Tensor) -> Kept:
        return KeptOnDevice(tensor)

    def begin_backward(self) -> None:
        """Nothing to do."""


class KeptOnDevice:
    """A tensor that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor.detach()
        self._version = self._tensor._version

    def take(self) -> Tensor:
        tensor, self._tensor = self._tensor, None
        if tensor is not None and tensor._version != self._version:
            raise RuntimeError("what a layer keeps for its backward has been written to in place after its forward")
        return _taken_once(tensor)


class HostStore:
    """Keeps tensors in pinned memory of the host, where that is not the device itself in plain copies.

    Copies run on a stream of their own beside the computation. In the forward a layer waits until the copies of the
    layer before the last have left the device; in the backward each layer's tensors are fetched while the layer after
    it is computed. So the device holds two layers' tensors at most.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._leaving: deque[_OnHost] = deque()
        # A layer lives as long as its call: what nobody will differentiate is neither held nor fetched.
        self._last: weakref.ref[_OnHost] | None = None

    def begin_forward(self) -> None:
        while self._leaving:
            self._leaving.popleft().wait_until_left()
        self._last = None

    def begin_layer(self) -> LayerStore:
        while len(self._leaving) > 1:
            self._leaving.popleft().wait_until_left()
        layer = _OnHost(self, self._last)
        self._leaving.append(layer)
        self._last = weakref.ref(layer)
        return layer

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        # A copy of a model shares neither streams nor tensors that are in flight.
        return HostStore()

    def stream(self, device: torch.device) -> Any:
        """The stream of copies between a device and the host; None for the CPU."""
        if device.type == "cpu":
            return None
        if device not in self._streams:
            self._streams[device] = torch.get_device_module(device).Stream(device)
        return self._streams[device]


class _OnHost:
    def __init__(self, store: HostStore, previous: weakref.ref[_OnHost] | None) -> None:
        self._store, self._previous = store, previous
        self._kept: list[_KeptOnHost] = []

    def keep(self, tensor: Tensor) -> Kept:
        if tensor.numel() * tensor.itemsize < _SMALLEST:
            return KeptOnDevice(tensor)
        kept = _KeptOnHost(tensor.detach(), self._store.stream(tensor.device))
        self._kept.append(kept)
        return kept

    def wait_until_left(self) -> None:
        for kept in self._kept:
            kept.wait_until_left()

    def begin_backward(self) -> None:
        previous, self._previous = self._previous, None
        for layer in (self, previous() if previous is not None else None):
            if layer is not None:
                layer.wait_until_left()
                for kept in layer._kept:
                    kept.fetch()


class _KeptOnHost:
    """A tensor on its way to the host, there, or on its way back.

    Memory of the device is allocated and freed in the order of the computing stream, which waits for a copy to the
    host before its source is freed, and for a copy from the host before it reads: so no block is used too early.
    """

    def __init__(self, tensor: Tensor, stream: Any) -> None:
        self._stream = stream
        self._device = tensor.device
        self._source: Tensor | None = tensor
        self._fetched: Tensor | None = None
        self._host: Tensor | None = _empty_on_host(tensor)
        self._event = self._copy(self._host, tensor)

    def wait_until_left(self) -> None:
        """The source is freed; on its device whatever is computed from here on runs after the copy."""
        if self._source is not None:
            self._wait()
            self._source = None

    def fetch(self) -> None:
        """Start to copy back."""
        if self._host is not None:
            self._fetched = torch.empty_like(self._host, device=self._device)
            self._event = self._copy(self._fetched, self._host)
            if self._stream is not None:
                # It may be dropped before it was taken: by a backward that ends early.
                self._fetched.record_stream(self._stream)
            self._host = None  # torch gives pinned memory to nobody else before the copy is done

    def take(self) -> Tensor:
        self.wait_until_left()
        self.fetch()
        tensor, self._fetched = self._fetched, None
        self._wait()
        return _taken_once(tensor)

    def _copy(self, target: Tensor, source: Tensor) -> Any:
        if self._stream is None:
            target.copy_(source)
            return None
        module = torch.get_device_module(self._device)
        self._stream.wait_stream(module.current_stream(self._device))
        with module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def _wait(self) -> None:
        if self._event is not None:
            torch.get_device_module(self._device).current_stream(self._device).wait_event(self._event)


def _empty_on_host(tensor: Tensor) -> Tensor:
    """Memory of the host for a tensor, with its strides where these leave no gaps."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type != "cpu")


def _taken_once(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise RuntimeError(
            "what a layer kept for its backward has been used: a second backward through the same loss needs a second "
            "forward"
        )
    return tensor

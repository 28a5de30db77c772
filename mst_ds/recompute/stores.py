"""Where tensors lie between the forward and the backward of a part of a model: on the device, or on the host.

A part is what is differentiated at once: a decoder layer, or one chunk of it.
"""

from __future__ import annotations

import functools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from mst_ds.geometry import host_pieces, pinned_block

from .pinned_pieces import Piece, PinnedPieces

T = TypeVar("T")

# Less than this stays on the device: random seeds and the like, but nothing of a preflight's small model.
_SMALLEST = 512
_WRITTEN_IN_PLACE = "what a layer keeps for its backward has been written to in place after its forward"


class Kept(Protocol):
    """A tensor that is kept for the backward, until it is taken or this object is dropped."""

    def take(self) -> Tensor:
        """The tensor, on its device. It is kept no longer: a second call is an error."""

    def read(self) -> Tensor:
        """The tensor, on its device, to which nobody writes. It is kept on."""

    def begin_read(self) -> Callable[[], Tensor]:
        """Begin to bring the tensor to its device. What is returned gives it, once, as `read` does."""


class Store(Protocol):
    """Keeps tensors from the forward for the backward. One for each model."""

    def begin_forward(self) -> None:
        """A forward of the model begins: parts before it have nothing to do with those that follow."""

    def begin_part(self) -> PartStore:
        """The forward of a part begins. What is returned is held until the part has been differentiated; of a part that
        keeps nothing, as in evaluation, nothing is."""


class PartStore(Protocol):
    """What one part keeps."""

    def keep(self, tensor: Tensor, *, is_shared: bool = False) -> Kept:
        """Keep a tensor, which nobody writes to before it is taken.

        Args:
            is_shared: it is read by other parts, too, and does not come to the device before somebody asks for it.
        """

    def begin_backward(self) -> None:
        """The part's backward begins: it will take what it kept but what is shared, and the part before it soon, too.
        Parts are differentiated in the reverse order in which they were begun."""


def read_in_turn(kept: Iterable[tuple[Kept, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The tensors of each tuple, as `Kept.read` gives them, while those of the next are on their way.

    The first are on their way from this call on. Whoever lets go of what it got before it asks for the next has the
    tensors of two tuples on the device at most; `enumerate` and `zip` hold what they gave last, and make that three.
    """
    rest = iter(kept)
    return _in_turn(rest, _begin_reads(next(rest, None)))


class DeviceStore:
    """Keeps tensors where they are."""

    def begin_forward(self) -> None:
        """Nothing to do."""

    def begin_part(self) -> PartStore:
        return _OnDevice()


class _OnDevice:
    def keep(self, tensor: Tensor, *, is_shared: bool = False) -> Kept:
        return KeptOnDevice(tensor)

    def begin_backward(self) -> None:
        """Nothing to do."""


class KeptOnDevice:
    """A tensor that stays where it is."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor: Tensor | None = tensor.detach()
        self._version = self._tensor._version

    def take(self) -> Tensor:
        tensor = self.read()
        self._tensor = None
        return tensor

    def read(self) -> Tensor:
        tensor = _not_taken(self._tensor)
        if tensor._version != self._version:
            raise RuntimeError(_WRITTEN_IN_PLACE)
        return tensor

    def begin_read(self) -> Callable[[], Tensor]:
        return self.read


def _device_module(device: torch.device) -> Any:
    return None if device.type == "cpu" else torch.get_device_module(device)


class HostStore:
    """Keeps tensors in pinned memory of the host, where that is not the device itself in plain copies.

    Copies run on a stream of their own beside the computation. In the forward a part waits until the copies of the part
    before the last have left the device; in the backward each part's tensors are fetched while the part after it is
    computed. So the device holds two parts' tensors at most; of shared ones, those that are read at the time. All that
    a model computes runs on one stream.

    Args:
        device_module: gives the module with the streams of a device, such as torch.cuda; None where there are none, as
            on the CPU.
    """

    def __init__(self, device_module: Callable[[torch.device], Any] = _device_module) -> None:
        self._device_module = device_module
        self._links: dict[torch.device, _Link] = {}
        self._leaving: deque[_OnHost] = deque()
        # A part lives as long as its call: what nobody will differentiate is neither held nor fetched.
        self._last: weakref.ref[_OnHost] | None = None

    def begin_forward(self) -> None:
        self.wait_until_left()
        self._last = None

    def begin_part(self) -> PartStore:
        self.wait_until_left(but=1)
        part = _OnHost(self, self._last)
        self._leaving.append(part)
        self._last = weakref.ref(part)
        return part

    def wait_until_left(self, but: int = 0) -> None:
        """What parts have given to the store is on the device no longer, but for those of the last `but` parts."""
        while len(self._leaving) > but:
            self._leaving.popleft().wait_until_left()

    def __deepcopy__(self, memo: dict[int, Any]) -> HostStore:
        # A copy of a model shares neither streams nor memory nor tensors that are in flight.
        return HostStore(self._device_module)

    def link(self, device: torch.device) -> _Link:
        """The way between a device and the host."""
        if device not in self._links:
            self._links[device] = _Link(device, self._device_module(device))
        return self._links[device]


class _OnHost:
    def __init__(self, store: HostStore, previous: weakref.ref[_OnHost] | None) -> None:
        self._store, self._previous = store, previous
        # Held until all copies have left. After that what its owner drops is neither held nor fetched.
        self._leaving: list[_KeptOnHost] = []
        self._own: list[weakref.ref[_KeptOnHost]] = []

    def keep(self, tensor: Tensor, *, is_shared: bool = False) -> Kept:
        if tensor.nbytes < _SMALLEST:
            return KeptOnDevice(tensor)
        kept = _KeptOnHost(tensor.detach(), self._store.link(tensor.device))
        self._leaving.append(kept)
        if not is_shared:
            self._own.append(weakref.ref(kept))
        return kept

    def wait_until_left(self) -> None:
        while self._leaving:
            self._leaving.pop(0).wait_until_left()

    def begin_backward(self) -> None:
        previous, self._previous = self._previous, None
        self._store.wait_until_left()
        for part in (self, previous() if previous is not None else None):
            if part is not None:
                part.fetch()

    def fetch(self) -> None:
        """Start to copy back what is not shared."""
        for reference in self._own:
            if (kept := reference()) is not None:
                kept.fetch()


class _KeptOnHost:
    """A tensor on its way to the host, there, or on its way back.

    Memory of the device is allocated and freed in the order of the computing stream. That waits for a copy to the host
    before the source is freed, and for a copy from the host before the target is read, or freed because nobody takes
    it: so no block is used too early, and the allocator need not keep any until the other stream is done.
    """

    def __init__(self, tensor: Tensor, link: _Link) -> None:
        self._link, self._device = link, tensor.device
        # Strides stay where they leave no gaps.
        self._form = torch.empty_like(tensor, device="meta")
        is_whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        # What a chunk was cut from is not held until the copy has left.
        source = tensor if is_whole and tensor.stride() == self._form.stride() else tensor.clone()
        pieces = link.pieces(tensor.nbytes)
        self._on_host = _when_dropped(self, link.give_back, pieces)
        wait = link.copy(_bytes_of(pieces), _flat_bytes(source))
        self._leaving = _when_dropped(self, _free_after, wait, source)
        self._version = source._version
        self._arriving: _Arriving | None = None

    def wait_until_left(self) -> None:
        """The source is freed; on its device whatever is computed from here on runs after the copy.

        Raises:
            RuntimeError: the source has been written to beside the copy.
        """
        leaving = self._leaving.peek()
        is_changed = leaving is not None and leaving[2][1]._version != self._version
        del leaving
        self._leaving()
        if is_changed:
            raise RuntimeError(_WRITTEN_IN_PLACE)

    def fetch(self) -> None:
        """Start to copy back, for good."""
        if (arriving := self._copy_back()) is not None:
            self._arriving = arriving
            self._on_host()

    def take(self) -> Tensor:
        self.wait_until_left()
        self.fetch()
        return _not_taken(self._arriving).take()

    def read(self) -> Tensor:
        return self.begin_read()()

    def begin_read(self) -> Callable[[], Tensor]:
        arriving = self._copy_back()
        if arriving is None:
            return self._read_fetched
        return functools.partial(self._read_copy, arriving)

    def _copy_back(self) -> _Arriving | None:
        if (on_host := self._on_host.peek()) is None:
            return None
        (pieces,) = on_host[2]
        return _Arriving(torch.empty_like(self._form, device=self._device), pieces, self._link)

    def _read_fetched(self) -> Tensor:
        return _not_taken(self._arriving).read()

    def _read_copy(self, arriving: _Arriving) -> Tensor:
        tensor = arriving.take()
        # It had left before: copies run in order.
        self.wait_until_left()
        return tensor


class _Arriving:
    """A tensor on its way to the device. The computing stream waits for it before it is read, or freed."""

    def __init__(self, target: Tensor, pieces: list[Piece], link: _Link) -> None:
        wait = link.copy(_flat_bytes(target), _bytes_of(pieces))
        self._target = _when_dropped(self, _free_after, wait, target)

    def read(self) -> Tensor:
        """The tensor, which is freed no sooner than this object."""
        wait, target = _not_taken(self._target.peek())[2]
        wait()
        return target

    def take(self) -> Tensor:
        """The tensor, once; its memory is the caller's."""
        wait, target = _not_taken(self._target.detach())[2]
        wait()
        return target


class _Link:
    """The way between a device and the host: the stream of copies, and the memory of the host for them.

    That is pieces, which fit any tensor. torch's allocator gives blocks of a power of two, and to a host that is far
    ahead of the device fresh ones. Here a piece is free once the copy from it has been given to the stream, on which
    the next copy into it runs later: there are never more than are in use at once, which is planned.
    """

    def __init__(self, device: torch.device, module: Any) -> None:
        self._device, self._module = device, module
        self._stream = None if module is None else module.Stream(device)
        pinned = device.type != "cpu"
        self._pinned = None if module is None else PinnedPieces(lambda size: _empty_on_host(size, pinned))

    def pieces(self, count: int) -> list[Piece]:
        """Pieces that hold `count` bytes. On the CPU they are plain memory of that size, at no address."""
        if self._pinned is None:
            return [Piece(0, _empty_on_host(size)) for size in host_pieces(count)]
        return [self._pinned.take(pinned_block(size)) for size in host_pieces(count)]

    def give_back(self, pieces: list[Piece]) -> None:
        if self._pinned is not None:
            self._pinned.give_back(pieces)

    def copy(self, targets: Iterable[Tensor], sources: Iterable[Tensor]) -> Callable[[], None]:
        """Start to copy bytes, after all that the device has been given to compute. What is returned makes it compute
        what follows after the copies."""
        if self._stream is None:
            _copy_bytes(targets, sources)
            return _nothing
        computing = self._module.current_stream(self._device)
        self._stream.wait_stream(computing)
        try:
            with self._module.stream(self._stream):
                _copy_bytes(targets, sources)
                event = self._stream.record_event()
        except BaseException:
            # Some copies may be on their way, and the caller's memory is freed.
            computing.wait_stream(self._stream)
            raise
        return functools.partial(computing.wait_event, event)


def _nothing() -> None:
    """There is nothing to wait for."""


def _copy_bytes(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        # A piece may be longer than what it holds.
        count = min(len(target), len(source))
        target[:count].copy_(source[:count], non_blocking=True)


def _bytes_of(pieces: Iterable[Piece]) -> list[Tensor]:
    return [piece.bytes for piece in pieces]


def _flat_bytes(tensor: Tensor) -> list[Tensor]:
    """The bytes of a tensor without gaps, in the order in which they lie, by pieces."""
    flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
    return list(flat.split(list(host_pieces(len(flat)))))


def _empty_on_host(count: int, pinned: bool = False) -> Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=pinned)


def _free_after(wait: Callable[[], None], tensor: Tensor) -> None:
    """The tensor's memory is the caller's until this has returned."""
    wait()


def _when_dropped(owner: Any, function: Callable[..., None], *args: Any) -> weakref.finalize[..., Any]:
    """Calls the function when called itself or when its owner is dropped, once; but not when the interpreter ends,
    with all streams."""
    finalizer = weakref.finalize(owner, function, *args)
    finalizer.atexit = False
    return finalizer


def _not_taken(kept: T | None) -> T:
    if kept is None:
        raise RuntimeError(
            "what a layer kept for its backward has been used: a second backward through the same loss needs a second "
            "forward"
        )
    return kept


def _begin_reads(kept: tuple[Kept, ...] | None) -> list[Callable[[], Tensor]] | None:
    return None if kept is None else [each.begin_read() for each in kept]


def _in_turn(
    rest: Iterator[tuple[Kept, ...]], ahead: list[Callable[[], Tensor]] | None
) -> Iterator[tuple[Tensor, ...]]:
    while ahead is not None:
        now, ahead = ahead, _begin_reads(next(rest, None))
        yield tuple(read() for read in now)

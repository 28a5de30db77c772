"""Pinned memory of the host in pieces: the buddy system, in which slabs are halved, and free halves join again."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor

from mst_ds.geometry import HOST_PIECE


class Piece(NamedTuple):
    """address: of its first byte, in slabs that are thought of as laid end to end. bytes: (size,) uint8."""

    address: int
    bytes: Tensor


class PinnedPieces:
    """Pieces of a power of two of bytes, `HOST_PIECE` at most, which are what a slab has. Slabs stay for good.

    What is taken while nothing is given back, as in a forward, leaves at most one free piece of each size below that of
    a slab, and they are less than a slab in all. So there are no more slabs than the most bytes that were ever in use
    fill, whatever sizes were taken before.

    Args:
        allocate: gives a slab of so many bytes.
    """

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._slabs: list[Tensor] = []
        self._free: defaultdict[int, dict[int, None]] = defaultdict(dict)  # by size: addresses
        self._given_back: deque[Piece] = deque()

    def take(self, size: int) -> Piece:
        """A part, as long as is asked for, of the smallest free piece that is long enough."""
        while self._given_back:
            self._join(self._given_back.popleft())
        found = size
        while found < HOST_PIECE and not self._free[found]:
            found *= 2
        if self._free[found]:
            address, _ = self._free[found].popitem()
        else:
            address = HOST_PIECE * len(self._slabs)
            self._slabs.append(self._allocate(HOST_PIECE))
        while found > size:
            found //= 2
            self._free[found][address + found] = None
        slab, start = divmod(address, HOST_PIECE)
        return Piece(address, self._slabs[slab][start : start + size])

    def give_back(self, pieces: Iterable[Piece]) -> None:
        """At any moment, such as in the midst of `take`, when the interpreter drops what nobody refers to."""
        self._given_back.extend(pieces)

    def _join(self, piece: Piece) -> None:
        """The other half of what a piece was halved from differs from it in one bit of the address."""
        address, size = piece.address, len(piece.bytes)
        while size < HOST_PIECE and address ^ size in self._free[size]:
            del self._free[size][address ^ size]
            address &= ~size
            size *= 2
        self._free[size][address] = None

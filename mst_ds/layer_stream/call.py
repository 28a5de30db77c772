"""One call of a decoder layer: the chunk that runs, and what its operators leave for later chunks and the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Any, Protocol, TypeVar

from mst_ds.minisequence import ParameterSums
from mst_ds.recompute import PartStore, Store

from .last_output import LastOutput

T = TypeVar("T")
C = TypeVar("C", bound="Carried")


class Carried(Protocol):
    """What an operator carries from chunk to chunk."""

    def missing_keys(self, chunk: int) -> list[int]:
        """The earlier chunks of whose keys and values a chunk's backward reads some that are neither kept nor there."""

    def end_forward(self) -> None:
        """The layer's forward has ended."""


class Pass(Enum):
    """What a chunk is run for: its output; its keys and values alone, which later chunks need; its gradients."""

    FORWARD = auto()
    KEYS = auto()
    BACKWARD = auto()


class KeysAreThere(Exception):
    """Ends a chunk that runs for its keys and values, once its last attention has them."""


class LayerCall:
    """One call of a decoder layer, from its forward to the end of its backward.

    Operators see the same call in each chunk, when it is computed for the first time and when it is computed again, and
    leave in it what they know: `note` for the same chunk, `carry` for the other chunks of the layer.

    Args:
        chunks: the tokens of each, (start, stop) of the L of this shard.
        last_output: of the layer.
        is_kept: whether a backward will follow, for which operators keep what they are asked to.
        context: of the forward, see `LayerStream`.

    Attributes:
        chunk: the number of the one that runs.
        runs_for: what it runs for.
        parts: where each chunk's tensors are kept.
        sums: to which operators add their weights' gradients; None in a forward.
    """

    def __init__(
        self,
        chunks: Sequence[slice],
        store: Store,
        last_output: LastOutput,
        *,
        is_kept: bool,
        context: Any = None,
    ) -> None:
        self.chunks, self.is_kept, self.last_output, self.context = chunks, is_kept, last_output, context
        self.chunk = 0
        self.runs_for = Pass.FORWARD
        self.parts: list[PartStore] = []
        self.sums: ParameterSums | None = None
        self._store = store
        self._notes: list[list[Any]] = [[] for _ in chunks]
        self._carried: list[Carried] = []
        self._notes_read = self._carried_read = 0

    @property
    def tokens(self) -> slice:
        """Of the chunk that runs."""
        return self.chunks[self.chunk]

    @property
    def is_last(self) -> bool:
        """Whether no chunk comes after this one."""
        return self.chunk == len(self.chunks) - 1

    @property
    def part(self) -> PartStore:
        """Where this chunk's tensors are kept."""
        return self.parts[self.chunk]

    def begin(self, chunk: int, runs_for: Pass) -> None:
        """A chunk is run: operators get what they left in the order in which they left it."""
        if runs_for is Pass.FORWARD:
            self.parts.append(self._store.begin_part())
        elif runs_for is Pass.BACKWARD:
            self.parts[chunk].begin_backward()
        self.chunk, self.runs_for = chunk, runs_for
        self._notes_read = self._carried_read = 0

    def end(self, chunk: int) -> None:
        """The gradients of a chunk are there: what was left for them is not needed again."""
        self._notes[chunk] = []

    def end_forward(self) -> None:
        """No chunk comes after this one."""
        for carried in self._carried:
            carried.end_forward()

    def keys_to_compute(self, chunk: int) -> list[int]:
        """The chunks that have to run for their keys, one after another, before a chunk's backward."""
        missing = [carried.missing_keys(chunk) for carried in self._carried]
        if len(missing) < 2:
            return missing[0] if missing else []
        # A later operator's keys are computed of what an earlier one gives, which reads keys before them: all at once,
        # so that none is missing after that. The last chunk may read none, where it begins with a document.
        return list(range(chunk)) if any(missing) else []

    @contextmanager
    def operator(self) -> Iterator[bool]:
        """An operator runs within whose output may not be needed: whether it need not be computed."""
        if self.runs_for is not Pass.BACKWARD:
            yield False
            return
        with self.last_output.of_operator() as is_unread:
            yield is_unread

    def note(self, make: Callable[[], T]) -> T:
        """What an operator leaves for when the same chunk is computed again: `make()` the first time."""
        self._notes_read += 1
        return _nth(self._notes[self.chunk], self._notes_read, make)

    def carry(self, make: Callable[[], C]) -> C:
        """What an operator carries from chunk to chunk: `make()` in the first."""
        self._carried_read += 1
        return _nth(self._carried, self._carried_read, make)

    @property
    def carries_more(self) -> bool:
        """Whether another operator of the layer, after the one that asks, carries something."""
        return self._carried_read < len(self._carried)


def _nth(known: list[Any], number: int, make: Callable[[], T]) -> T:
    if len(known) < number:
        known.append(make())
    found: T = known[number - 1]
    return found

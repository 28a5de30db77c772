"""Where the documents of packed rows lie."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import torch
from torch import Tensor

DocumentStarts = list[list[int]]


@dataclass(frozen=True)
class Borders:
    """The borders of documents as kernels take them that attend to all of them in one call.

    Args:
        queries, keys: (documents + 1,) int32: in all rows' tokens, one after another, the first of each document, and
            the end.
        most_queries, most_keys: of a document.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Continued:
    """In rows of a batch, a document that goes on into a range of tokens.

    Args:
        first: its first position, before the range.
        stop: the position after its last in the range.
    """

    rows: slice
    first: int
    stop: int


@dataclass(frozen=True)
class Documents:
    """The documents of a batch.

    Args:
        starts: for each row of the batch the first position of each of its documents, 0 first; None when every row is
            one document, a list of one for all rows alike.
    """

    starts: DocumentStarts | None = None
    _borders: dict[tuple[object, ...], Borders] = field(default_factory=dict, repr=False, compare=False)
    _within: dict[tuple[int, int], Documents] = field(default_factory=dict, repr=False, compare=False)
    _continued: dict[tuple[int, int, int], list[Continued]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def are_rows(self) -> bool:
        """Whether every row is one document."""
        return self.starts is None or all(len(row) == 1 for row in self.starts)

    def has_longer(self, size: int, length: int) -> bool:
        """Whether some document has more than `size` tokens; length: of a row."""
        rows = [[0]] if self.starts is None else self.starts
        return any(stop - start > size for row in rows for start, stop in pairwise([*row, length]))

    def in_blocks(self, size: int, length: int) -> Documents:
        """Each block of `size` tokens of a document, counted from its first, as a document of its own.

        Args:
            length: of a row.
        """
        rows = [[0]] if self.starts is None else self.starts
        return Documents(
            [
                [block for start, stop in pairwise([*starts, length]) for block in range(start, stop, size)]
                for starts in rows
            ]
        )

    def parts(self, batch: int, queries: int, keys: int) -> Iterator[tuple[slice, slice, slice]]:
        """Rows, queries and keys of each document that has queries; rows with the same documents come together."""
        for rows, starts in self._rows(batch):
            for of_queries, of_keys in _ranges(starts, queries, keys):
                if of_queries.start < of_queries.stop:
                    yield rows, of_queries, of_keys

    def borders(self, batch: int, queries: int, keys: int, device: torch.device) -> Borders:
        """Made once for all layers."""
        kind = batch, queries, keys, device
        if kind not in self._borders:
            rows = self._rows(batch)
            of_rows = [
                (row * queries + of_queries.start, row * keys + of_keys.start, of_queries, of_keys)
                for row in range(batch)
                for of_queries, of_keys in _ranges(rows[row % len(rows)][1], queries, keys)
            ]
            self._borders[kind] = Borders(
                queries=on_device([start for start, *_ in of_rows] + [batch * queries], device, torch.int32),
                keys=on_device([start for _, start, *_ in of_rows] + [batch * keys], device, torch.int32),
                most_queries=max(part.stop - part.start for *_, part, _ in of_rows),
                most_keys=max(part.stop - part.start for *_, part in of_rows),
            )
        return self._borders[kind]

    def within(self, tokens: slice) -> Documents:
        """What lies of them in a range of tokens, whose first is at position 0; made once for all layers. A document
        that began before the range begins with it."""
        if self.starts is None:
            return self
        kind = tokens.start, tokens.stop
        if kind not in self._within:
            self._within[kind] = Documents(
                [
                    [
                        0,
                        *(
                            start - tokens.start
                            for start in row[bisect_right(row, kind[0]) : bisect_left(row, kind[1])]
                        ),
                    ]
                    for row in self.starts
                ]
            )
        return self._within[kind]

    def continued(self, batch: int, tokens: slice) -> list[Continued]:
        """Those that began before a range of tokens and go on into it; neighbouring rows with the same come together.
        Found once for all layers."""
        kind = batch, tokens.start, tokens.stop
        if kind not in self._continued:
            rows = [(rows, *_around(starts, tokens)) for rows, starts in self._rows(batch)]
            self._continued[kind] = [
                Continued(slice(same[0][0].start, same[-1][0].stop), first, stop)
                for (first, stop), group in groupby(rows, key=lambda row: row[1:])
                if first < tokens.start
                for same in [list(group)]
            ]
        return self._continued[kind]

    def first_continued(self, tokens: slice) -> int:
        """The first position of the earliest document that goes on into a range of tokens, at most the range's own."""
        return min([part.first for part in self.continued(1, tokens)], default=tokens.start)

    def _rows(self, batch: int) -> list[tuple[slice, list[int]]]:
        if self.starts is None or len(self.starts) == 1:
            return [(slice(0, batch), [0] if self.starts is None else self.starts[0])]
        return [(slice(row, row + 1), starts) for row, starts in enumerate(self.starts)]


def _ranges(starts: list[int], queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Queries, none or some, and keys of each document."""
    first = keys - queries
    for start, stop in pairwise([*starts, keys]):
        yield slice(max(start - first, 0), max(stop - first, 0)), slice(start, stop)


def _around(starts: list[int], tokens: slice) -> tuple[int, int]:
    """The first position of the document of a range's first token, and that after its last token in the range."""
    following = bisect_right(starts, tokens.start)
    return starts[following - 1], min([tokens.stop, *starts[following : following + 1]])


def on_device(numbers: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor, copied from pinned memory, so that nothing waits for the copy."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type != "cpu").to(device, non_blocking=True)

"""Where the documents of packed rows lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

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
class Documents:
    """The documents of a batch.

    Args:
        starts: for each row of the batch the first position of each of its documents, 0 first; None when every row is
            one document, a list of one for all rows alike.
    """

    starts: DocumentStarts | None = None
    _borders: dict[tuple[object, ...], Borders] = field(default_factory=dict, repr=False, compare=False)

    @property
    def are_rows(self) -> bool:
        """Whether every row is one document."""
        return self.starts is None or all(len(row) == 1 for row in self.starts)

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

    def _rows(self, batch: int) -> list[tuple[slice, list[int]]]:
        if self.starts is None or len(self.starts) == 1:
            return [(slice(0, batch), [0] if self.starts is None else self.starts[0])]
        return [(slice(row, row + 1), starts) for row, starts in enumerate(self.starts)]


def _ranges(starts: list[int], queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Queries, none or some, and keys of each document."""
    first = keys - queries
    for start, stop in pairwise([*starts, keys]):
        yield slice(max(start - first, 0), max(stop - first, 0)), slice(start, stop)


def on_device(numbers: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """The numbers as a tensor, copied from pinned memory, so that nothing waits for the copy."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type != "cpu").to(device, non_blocking=True)

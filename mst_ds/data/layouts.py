"""Which tokens of which documents a sample holds."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mst_ds.config import Packing
from mst_ds.data.bins import first_fit_decreasing
from mst_ds.data.groups import documents_of, groups_of


class Part(NamedTuple):
    """Tokens [start, stop) of these documents, one after the other."""

    documents: NDArray[np.int64]
    start: int
    stop: int


class Layout(Protocol):
    """The samples of a dataset."""

    def __len__(self) -> int: ...

    def part(self, index: int) -> Part:
        """What sample `index` holds; documents by their number among the lengths."""
        ...


def samples_per_run(run_lengths: NDArray[np.int64], seq_len: int) -> NDArray[np.int64]:
    """The number of samples that each run of tokens is cut into, not counting one of a single token."""
    return -(-(run_lengths - 1) // seq_len)


class CutRuns:
    """Runs of tokens, cut after every `seq_len`: all documents together, or with packing "none" each by itself.

    Args:
        lengths: of the documents, in tokens.
    """

    def __init__(self, lengths: NDArray[np.int64], seq_len: int, packing: Packing) -> None:
        self._seq_len = seq_len
        # Document d is tokens [ends[d - 1], ends[d]) of the stream of all documents.
        self._ends = np.cumsum(lengths)
        self._run_ends = self._ends if packing == "none" else self._ends[-1:]
        # Run r is samples [sample_ends[r - 1], sample_ends[r]).
        self._sample_ends = np.cumsum(samples_per_run(np.diff(self._run_ends, prepend=0), seq_len))

    def __len__(self) -> int:
        return int(self._sample_ends[-1]) if len(self._sample_ends) else 0

    def part(self, index: int) -> Part:
        """See `Layout`."""
        run = int(np.searchsorted(self._sample_ends, index, side="right"))
        first_sample, first_token = (int(ends[run - 1]) if run else 0 for ends in (self._sample_ends, self._run_ends))
        start = first_token + (index - first_sample) * self._seq_len
        stop = min(start + self._seq_len, int(self._run_ends[run]))
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right")
        before = int(self._ends[first - 1]) if first else 0
        return Part(np.arange(first, last + 1), start - before, stop - before)


class WholeDocuments:
    """Whole documents: as many to a sample as have room, or with packing "none" one; of those that stay together all.

    Args:
        lengths: of the documents, in tokens; those below 2 are left out, having nothing to learn.
        seq_len: tokens in a sample, no less than a group of documents has.
        group: documents that stay together.
    """

    def __init__(self, lengths: NDArray[np.int64], seq_len: int, packing: Packing, group: int = 1) -> None:
        self._lengths = lengths
        of_groups = groups_of(lengths, group)
        used = np.flatnonzero((of_groups > 1).all(axis=1))
        bins = (
            np.arange(len(used))[:, None]
            if packing == "none"
            else first_fit_decreasing(of_groups.sum(axis=1)[used], seq_len)
        )
        self._samples = [documents_of(used[each], group) for each in bins]

    def __len__(self) -> int:
        return len(self._samples)

    def part(self, index: int) -> Part:
        """See `Layout`."""
        documents = self._samples[index]
        return Part(documents, 0, int(self._lengths[documents].sum()))

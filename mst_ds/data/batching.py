"""How many documents may be in memory at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Of text, save a longer document, which is alone with that much of others.
BYTES_AT_ONCE = 2**25
_MOST_DOCUMENTS_AT_ONCE = 2**10


def documents_at_once(lengths: NDArray[np.int64]) -> int:
    """As many that beside the longest of them there is never more than `BYTES_AT_ONCE`.

    Args:
        lengths: bytes of each document, in the order in which they are read.
    """
    number = _MOST_DOCUMENTS_AT_ONCE
    while number > 1:
        starts = np.arange(0, len(lengths), number)
        if not len(starts):
            break
        if (np.add.reduceat(lengths, starts) - np.maximum.reduceat(lengths, starts)).max() <= BYTES_AT_ONCE:
            break
        number //= 2
    return number


def with_neighbours(at_once: int, number: int) -> int:
    """About `at_once` of a number of documents, so that none is alone, the last one neither."""
    at_once = max(2, at_once)
    while number > at_once and number % at_once == 1:
        at_once += 1
    return at_once

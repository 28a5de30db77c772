"""Whole documents into samples: bin packing."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def first_fit_decreasing(lengths: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Put each length into a bin: the longest first, of equals the one that comes first, each into the first bin with
    room for it. That takes at most 11/9 of the bins that would do, and 6/9 of one (Dósa 2007).

    O(n log n): a tree over the bins holds the most room that is in each of its halves.

    Args:
        lengths: (N,), each 1 to `size`.

    Returns:
        For each bin the indices of the lengths in it, ascending; the bins by the first of these.
    """
    if not len(lengths):
        return []
    # At most one bin is no more than half full.
    most_bins = min(len(lengths), 2 * int(lengths.sum()) // size + 1)
    leaves = 1 << (most_bins - 1).bit_length()
    # Node n has the children 2n and 2n + 1.
    room = [size] * (2 * leaves)
    bins: list[list[int]] = [[] for _ in range(leaves)]
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        bins[node - leaves].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            left, right = room[2 * node], room[2 * node + 1]
            most = left if left > right else right
            if room[node] == most:
                break
            room[node] = most
    return sorted((np.array(sorted(each)) for each in bins if each), key=lambda each: int(each[0]))

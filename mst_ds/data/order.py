"""The order of samples: an endless stream of permutations that depends on nothing but a seed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def permutation(size: int, *seed: int) -> NDArray[np.int64]:
    """A random order of `range(size)`, the same in every version of numpy.

    numpy keeps the raw stream of a bit generator the same across versions (NEP 19), but not the result of
    `Generator.permutation`, and a run resumed after an upgrade must go on in the order that it began with.
    Each seed is >= 0.
    """
    return np.argsort(np.random.PCG64(seed).random_raw(size), kind="stable")


class SampleOrder:
    """Sample numbers by position in an endless stream: permutation after permutation of the whole dataset.

    A position means the same sample whoever asks and whatever was asked before, so there is no epoch to set.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        # A batch can lie in two epochs, so the last two are kept.
        self._epoch = lru_cache(maxsize=2)(lambda epoch: permutation(num_samples, seed, epoch))

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_samples)
        return int(self._epoch(epoch)[offset])

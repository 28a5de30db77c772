"""Documents that follow each other and stay together: a document by itself, or the two of a preference."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Number = TypeVar("Number", bound=np.generic)


def groups_of(documents: NDArray[Number], group: int) -> NDArray[Number]:
    """Of each group of a number of documents what these have: (N * group,) -> (N, group)."""
    return documents.reshape(-1, group)


def documents_of(groups: NDArray[np.int64], group: int) -> NDArray[np.int64]:
    """The numbers of the documents of groups, by the numbers of the groups: (N,) -> (N * group,)."""
    return (groups[:, None] * group + np.arange(group)).ravel()


def counted(number: int, group: int) -> str:
    """So many groups, as people call them."""
    name = "document" if group == 1 else "pair"
    return f"{number:,} {name}{'' if number == 1 else 's'}"

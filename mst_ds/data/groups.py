"""Documents that follow each other and stay together: a document by itself, or the two of a preference."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from mst_ds.rows.kinds import LABEL

Number = TypeVar("Number", bound=np.generic)


def groups_of(documents: NDArray[Number], group: int) -> NDArray[Number]:
    """Of each group of a number of documents what these have: (N * group,) -> (N, group)."""
    return documents.reshape(-1, group)


def documents_of(groups: NDArray[np.int64], group: int) -> NDArray[np.int64]:
    """The numbers of the documents of groups, by the numbers of the groups: (N,) -> (N * group,)."""
    return (groups[:, None] * group + np.arange(group)).ravel()


def are_answers(tokens: Dataset, group: int) -> bool:
    """Whether a group of `tokens` is an answer with a label and, behind the same prompt, another prompt's answer."""
    return group > 1 and LABEL in tokens.column_names


def counted(number: int, tokens: Dataset, group: int) -> str:
    """So many groups of `tokens`, as people call them."""
    name = "document" if group == 1 else "answer" if are_answers(tokens, group) else "pair"
    return f"{number:,} {name}{'' if number == 1 else 's'}"

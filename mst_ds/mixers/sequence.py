"""The sequence that a mixer works on: who holds the rest of it, and where its documents lie."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mst_ds.attention import Documents
from mst_ds.sequence_parallel import SequenceGroup


@dataclass(frozen=True)
class MixedSequence:
    """What a mixer needs to know of a forward pass beyond its tensors.

    Args:
        group: the ranks that hold the sequence, consecutive tokens each; None where it is not sharded.
        documents: of the whole sequence.
    """

    group: SequenceGroup | None
    documents: Documents

    def rows(self, batch: int, length: int) -> list[tuple[int, list[int]]]:
        """How many rows of the batch have the same documents, and how long these are; all rows in their order.

        Args:
            length: of the whole sequence.
        """
        starts = self.documents.starts or [[0]]
        count = batch if len(starts) == 1 else 1
        return [(count, [after - first for first, after in pairwise([*row, length])]) for row in starts]

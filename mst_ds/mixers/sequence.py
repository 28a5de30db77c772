"""The sequence that a mixer works on: who holds the rest of it, and where its documents lie."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from mst_ds.attention import Documents
from mst_ds.layer_stream import LayerCall
from mst_ds.sequence_parallel import SequenceGroup

from .carried import CarriedState


@dataclass(frozen=True)
class MixedSequence:
    """What a mixer needs to know of a forward pass beyond its tensors.

    Args:
        group: the ranks that hold the sequence, of each chunk consecutive tokens; None where it is not sharded.
        documents: of the whole sequence.
        call: of the layer, where it is worked through in several chunks: tensors are of the one that runs.
    """

    group: SequenceGroup | None
    documents: Documents
    call: LayerCall | None = None

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size

    def stretch(self, length: int) -> slice:
        """Of the whole sequence, what all ranks hold together that have `length` tokens each of the chunk."""
        start = 0 if self.call is None else self.ranks * self.call.tokens.start
        return slice(start, start + self.ranks * length)

    def piece(self, length: int) -> slice:
        """What this rank holds of that."""
        start = self.stretch(length).start + (0 if self.group is None else self.group.rank * length)
        return slice(start, start + length)

    def carried(self) -> CarriedState | None:
        """What the operator that asks carries from chunk to chunk; None where there is one chunk."""
        return None if self.call is None else self.call.carry(CarriedState)

    def continued(self, batch: int, tokens: slice) -> list[bool]:
        """For each row whether its first document of a range of tokens began before it."""
        rows = [False] * batch
        for continued in self.documents.continued(batch, tokens):
            rows[continued.rows] = [True] * (continued.rows.stop - continued.rows.start)
        return rows

    def rows(self, batch: int, tokens: slice) -> list[tuple[int, list[int]]]:
        """How many rows of the batch have the same documents, and how long these are within a range of tokens; all rows
        in their order."""
        starts = self.documents.within(tokens).starts or [[0]]
        count = batch if len(starts) == 1 else 1
        length = tokens.stop - tokens.start
        return [(count, [after - first for first, after in pairwise([*row, length])]) for row in starts]

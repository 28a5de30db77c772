"""The arguments that say where documents begin, beside `position_ids`: those of collators of batches without padding,
and the table that `mst_ds.data.shard` has made of the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mst_ds.attention import DocumentStarts
from mst_ds.document_table import rows_of_table
from mst_ds.token_layout import TokenLayout

TABLE = "document_table"
_MAKE_SHARDS = "mst_ds.data.shard(batch, plan.topology, layer_chunks=plan.settings.layer_chunks)"
_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k")
_LONGEST = ("max_length_q", "max_length_k")


@dataclass(frozen=True)
class ToldDocuments:
    """What such an argument says.

    Attributes:
        starts: for each row of `length` tokens the first index of each document.
        lengths: how long each is, see `document_table`; None where that was not said.
    """

    argument: str
    starts: DocumentStarts
    length: int
    lengths: list[list[int]] | None = None

    @property
    def is_certain(self) -> bool:
        """Whether it was made of positions and mask, so that there is nothing to compare it with."""
        return self.lengths is not None

    @property
    def is_packed(self) -> bool:
        """Whether a row holds more than one document; padding is none."""
        if self.lengths is not None:
            return any(sum(length > 0 for length in row) > 1 for row in self.lengths)
        return any(len(row) > 1 for row in self.starts)

    @property
    def separate_starts(self) -> DocumentStarts | None:
        """As `find_document_starts` gives them: None where every row is one document."""
        return None if all(row == [0] for row in self.starts) else self.starts

    def check(self, found: DocumentStarts | None) -> None:
        """Compare them with what `position_ids` say: starts as `find_document_starts` gives them.

        Raises:
            ValueError: they differ.
        """
        rows = [[0]] if found is None else found
        rows = rows * len(self.starts) if len(rows) == 1 else rows
        for row, (said, in_positions) in enumerate(zip(self.starts, rows, strict=True)):
            if said != in_positions:
                index = min(set(said) ^ set(in_positions))
                which = (self.argument, "position_ids") if index in said else ("position_ids", self.argument)
                raise ValueError(
                    f"{self.argument} and position_ids differ: in row {row} a document begins at token {index} by "
                    f"{which[0]}, and none by {which[1]}: leave {self.argument} out"
                )

    def positions(self, device: torch.device) -> Tensor:
        """(B, length): from 0 in each document."""
        rows = []
        for starts in self.starts:
            first = torch.tensor(starts)
            lengths = torch.diff(first, append=first.new_tensor([self.length]))
            rows.append(torch.arange(self.length) - first.repeat_interleave(lengths))
        return torch.stack(rows).to(device, non_blocking=True)


def take_document_starts(kwargs: dict[str, Any], batch: int, length: int, layout: TokenLayout) -> ToldDocuments | None:
    """Take them out of `kwargs`; None where there are none.

    Args:
        kwargs: of the decoder. `cu_seq_lens_q`: (documents + 1,), where each begins in all B x L tokens, with the end.
            `max_length_q`: at least the longest. `seq_idx`: (B, L), a number that changes from document to document.
            `document_table`: of the whole sequence, see there, on the CPU, in place of all these.
        batch: B, length: L, layout: of the plan's shards.

    Raises:
        ValueError: they contradict each other or the batch, or the sequence is sharded, or was for another plan, or
            nothing says how.
    """
    table = kwargs.pop(TABLE, None)
    taken = {name: kwargs.pop(name, None) for name in (*_LENGTHS, *_LONGEST, "seq_idx")}
    taken = {name: value for name, value in taken.items() if value is not None}
    if table is not None:
        if taken or kwargs.get("position_ids") is None:
            others = f", and without {', '.join(taken)}" if taken else ""
            raise ValueError(f"{TABLE} goes with the position_ids of which it was made{others}")
        return _from_table(table, batch, length, layout)
    if layout.sp_size > 1 and layout.chunks > 1:
        # Consecutive tokens have the same shape, and would be silently wrong.
        raise ValueError(
            f"with sp_size {layout.sp_size} and layer_chunks {layout.chunks} a shard is not of consecutive tokens, and "
            f"this one has no {TABLE}, which says how it was made: make it by {_MAKE_SHARDS}, or set "
            '"layer_chunks": 1 in the "mst" block'
        )
    told = [_from_lengths(name, taken[name], batch, length) for name in _LENGTHS if name in taken]
    if "seq_idx" in taken:
        told.append(_from_indices(taken["seq_idx"], batch, length))
    if told and layout.sp_size > 1:
        raise ValueError(
            f"with sp_size > 1 documents are told apart by position_ids alone: leave {told[0].argument} out"
        )
    for other in told[1:]:
        if other.starts != told[0].starts:
            raise ValueError(f"{told[0].argument} and {other.argument} differ: pass position_ids in place of both")
    for name in _LONGEST:
        if told and name in taken:
            longest = max(
                stop - start for row in told[0].starts for start, stop in zip(row, [*row[1:], length], strict=True)
            )
            if int(taken[name]) < longest:
                raise ValueError(
                    f"{name} is {int(taken[name])}, but a document of {told[0].argument} has {longest} tokens"
                )
    return told[0] if told else None


def _from_lengths(name: str, given: Any, batch: int, length: int) -> ToldDocuments:
    tokens = batch * length
    borders = torch.as_tensor(given).flatten().tolist()
    if borders[:1] != [0] or borders[-1] != tokens or borders != sorted(borders):
        raise ValueError(f"{name} must rise from 0 to the number of tokens, {tokens}; got {_shortened(borders)}")
    starts = sorted(set(borders[:-1]) - {tokens})
    rows = [[start - row * length for start in starts if start // length == row] for row in range(batch)]
    if any(row[:1] != [0] for row in rows):
        raise ValueError(f"{name} has a document that goes on from one row into the next: pass one row")
    return ToldDocuments(name, rows, length)


def _from_table(table: Tensor, batch: int, length_of_shard: int, layout: TokenLayout) -> ToldDocuments:
    rows = table.tolist()  # once, as a user's loop may have brought it to a device
    of_shards, documents, length = rows[0], rows[1:], length_of_shard * layout.sp_size
    given = TokenLayout(*of_shards)
    if given.sp_size != layout.sp_size or (layout.sp_size > 1 and given.chunks != layout.chunks):
        raise ValueError(
            f"{TABLE} is of shards for sp_size {given.sp_size} and layer_chunks {given.chunks}, but the plan has "
            f"sp_size {layout.sp_size} and layer_chunks {layout.chunks}: make them by {_MAKE_SHARDS}"
        )
    if not _is_whole(documents, batch, length):
        raise ValueError(f"{TABLE} is not that of {batch} x {length} tokens: pass that of the whole batch")
    starts, lengths = rows_of_table(rows, batch, length)
    return ToldDocuments(TABLE, starts, length, lengths)


def _is_whole(documents: list[list[int]], batch: int, length: int) -> bool:
    """Whether they are those of `batch` rows of `length` tokens."""
    first = [start for start, _ in documents]
    if not first or not set(range(0, batch * length, length)) <= set(first) or first[-1] >= batch * length:
        return False
    # Positions rise by one within a document, and its length is its last position and 1; that of padding 0.
    return all(
        of_document == 0 or of_document >= after - start
        for (start, of_document), after in zip(documents, [*first[1:], batch * length], strict=True)
    )


def _from_indices(given: Any, batch: int, length: int) -> ToldDocuments:
    indices = torch.as_tensor(given)
    if indices.shape not in {(batch, length), (1, length)}:
        raise ValueError(f"seq_idx must be (batch, length), that is {(batch, length)}; got {tuple(indices.shape)}")
    rows = []
    for row in indices.expand(batch, -1):
        begins = (row[1:] != row[:-1]).nonzero().flatten() + 1
        rows.append([0, *begins.tolist()])
    return ToldDocuments("seq_idx", rows, length)


def _shortened(values: list[int]) -> str:
    return str(values) if len(values) <= 8 else f"[{', '.join(map(str, values[:4]))}, ..., {values[-1]}]"

"""Where a token stands in its document and how long that is, for rotary embeddings whose frequencies depend on it."""

from __future__ import annotations

import torch
from torch import Tensor

from mst_ds.attention import DocumentStarts
from mst_ds.token_layout import TokenLayout

from .groups import SequenceGroup


def positions_in_documents(position_ids: Tensor, starts: DocumentStarts | None, group: SequenceGroup | None) -> Tensor:
    """Positions that begin with 0 at each document, for those that begin with 0 at each row.

    Args:
        position_ids: (B, L) of this rank's shard, consecutive tokens.
        starts: what `find_document_starts` found for them.
        group: the sequence group; None where the sequence is not sharded.
    """
    length = position_ids.shape[1] * (1 if group is None else group.size)
    firsts = [
        first.repeat_interleave(after - first, output_size=length)
        for first, after in _documents(starts, length, position_ids.device)
    ]
    return position_ids - _shard(torch.stack(firsts), group)


def document_lengths(
    position_ids: Tensor,
    attention_mask: Tensor | None,
    starts: DocumentStarts | None,
    group: SequenceGroup | None,
) -> Tensor:
    """How long each token's document is, with one all-gather: its last position and 1, as transformers has it.

    Args:
        position_ids: (B, L) of this rank's shard, consecutive tokens; one row may stand for all.
        attention_mask: (B, L) of this rank's shard, 1 for a token and 0 for padding; None where all are tokens.
        starts: what `find_document_starts` found for them.
        group: the sequence group; None where the sequence is not sharded.

    Returns:
        (B, L), 1 on padding, which decides nothing.
    """
    whole = position_ids
    if group is not None:
        whole = TokenLayout(group.size).join(group.all_gather(position_ids), dim=1)
    length = whole.shape[1]
    documents = _documents(starts, length, whole.device)
    batch = max(len(documents), len(whole))
    lengths = [
        (row[after - 1] + 1).repeat_interleave(after - first, output_size=length)
        for row, (first, after) in zip(whole.expand(batch, -1), documents * (batch // len(documents)), strict=True)
    ]
    of_tokens = _shard(torch.stack(lengths), group)
    return of_tokens if attention_mask is None else of_tokens.masked_fill(attention_mask == 0, 1)


def lengths_of_tokens(
    starts: DocumentStarts, lengths: list[list[int]], length: int, group: SequenceGroup | None, layer_chunks: int = 1
) -> Tensor:
    """`document_lengths` from what is known of the whole sequence, on the CPU and without an exchange.

    Args:
        starts: for each row of `length` tokens the first index of each document.
        lengths: how long each is, 0 for padding.
        group: as in `document_lengths`.
        layer_chunks: of the shards, see `TokenLayout`.
    """
    rows = []
    for of_row, (first, after) in zip(lengths, _documents(starts, length, torch.device("cpu")), strict=True):
        rows.append(torch.tensor(of_row).clamp(min=1).repeat_interleave(after - first))
    return _shard(torch.stack(rows), group, layer_chunks)


def _documents(starts: DocumentStarts | None, length: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """For each row, or for all alike, the first token of each document and the one after its last."""
    found = []
    for row in starts or [[0]]:
        borders = torch.tensor([*row, length]).to(device, non_blocking=True)
        found.append((borders[:-1], borders[1:]))
    return found


def _shard(whole: Tensor, group: SequenceGroup | None, layer_chunks: int = 1) -> Tensor:
    """This rank's part of (B, S)."""
    return whole if group is None else TokenLayout(group.size, layer_chunks).part(whole, group.rank, dim=1)

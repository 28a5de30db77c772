"""Where documents begin in a sequence of which each rank holds a shard."""

from __future__ import annotations

from torch import Tensor

from mst_ds.attention import DocumentStarts
from mst_ds.document_table import document_table, rows_of_table
from mst_ds.token_layout import TokenLayout

from .groups import SequenceGroup


def find_document_starts(
    position_ids: Tensor, attention_mask: Tensor | None, group: SequenceGroup | None
) -> DocumentStarts | None:
    """Find where documents begin in the whole sequence, see `document_table`, with one all-gather.

    The host waits for the device of the tensors. A batch of `mst_ds.data.shard` brings its table along instead.

    Args:
        position_ids: (B, L) of this rank's shard, consecutive tokens; one row may stand for all.
        attention_mask: (B, L) of this rank's shard, 1 for a token and 0 for padding; None where all are tokens.
        group: the sequence group; None where the sequence is not sharded.

    Returns:
        For each row the first index of each document in the whole sequence, or None when every row is one document.

    Raises:
        ValueError: positions that are not one row for each sequence, or a mask of another shape or with other values
            than 0 and 1.
    """
    if position_ids.dim() != 2:
        raise ValueError(f"position_ids must be (batch, length), got shape {tuple(position_ids.shape)}")
    # Position and mask of a token travel as one number, so that ranks with and without a mask exchange the same.
    tokens = 2 * position_ids.long() + 1
    if attention_mask is not None:
        is_binary = bool(((attention_mask == 0) | (attention_mask == 1)).all())
        if attention_mask.dim() != 2 or attention_mask.shape[1] != position_ids.shape[1] or not is_binary:
            raise ValueError(
                f"attention_mask must be (batch, {position_ids.shape[1]}), 1 for a token and 0 for padding; "
                f"got shape {tuple(attention_mask.shape)}{'' if is_binary else ' and other values'}"
            )
        tokens = tokens - 1 + attention_mask.long()
    layout = TokenLayout(1 if group is None else group.size)
    if group is not None:
        tokens = layout.join(group.all_gather(tokens), dim=1)
    table = document_table(tokens // 2, tokens % 2, layout)
    starts, _ = rows_of_table(table.tolist(), *tokens.shape)
    return None if all(row == [0] for row in starts) else starts

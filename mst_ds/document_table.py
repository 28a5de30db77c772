"""The documents of whole sequences as a table, which is made where the tokens are and read where a device is waited for
by nobody."""

from __future__ import annotations

import torch
from torch import Tensor

from mst_ds.token_layout import TokenLayout


def document_table(position_ids: Tensor, attention_mask: Tensor | None, layout: TokenLayout) -> Tensor:
    """Find the documents of whole sequences.

    A document begins where a position does not go on by one, and where padding begins or ends. A run of padding is one
    document, whatever its positions: real tokens never see it, on either side.

    Args:
        position_ids: (B, S); one row may stand for all.
        attention_mask: (B, S), 1 for a token and 0 for padding; None where all are tokens.
        layout: of the shards that the table goes with.

    Returns:
        (1 + N, 2) int64. First the layout: the ranks of a sequence and the chunks of their shards. Then a row for each
        document: the index of its first token among all B x S, and its length as rotary embeddings know it, which is
        its last position and 1; for padding 0.
    """
    is_token = torch.ones_like(position_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    positions = position_ids.expand_as(is_token) if len(position_ids) == 1 else position_ids
    is_token = is_token.expand_as(positions)
    both_padding = ~(is_token[:, 1:] | is_token[:, :-1])
    goes_on = (positions[:, 1:] == positions[:, :-1] + 1) & (is_token[:, 1:] == is_token[:, :-1])
    is_first = torch.ones_like(is_token)
    is_first[:, 1:] = ~(goes_on | both_padding)
    first = is_first.flatten().nonzero().flatten()
    last = torch.cat([first[1:], first.new_tensor([is_first.numel()])]) - 1
    lengths = (positions.flatten()[last] + 1) * is_token.flatten()[last]
    documents = torch.stack([first, lengths], dim=1)
    return torch.cat([documents.new_tensor([[layout.sp_size, layout.chunks]]), documents])


def rows_of_table(table: list[list[int]], batch: int, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Of a table as a list: for each of `batch` rows of `length` tokens the first index of each document, and how long
    each is."""
    starts: list[list[int]] = [[] for _ in range(batch)]
    lengths: list[list[int]] = [[] for _ in range(batch)]
    for first, of_document in table[1:]:
        row, start = divmod(first, length)
        starts[row].append(start)
        lengths[row].append(of_document)
    return starts, lengths

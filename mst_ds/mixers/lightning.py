"""Lightning attention: linear attention with a decay for each head, block by block (MiniMax-01, arXiv 2501.08313)."""

from __future__ import annotations

import torch
from torch import Tensor

from .scan import Scan
from .sequence import MixedSequence

_SCAN = Scan(
    arguments=("query", "key", "value", "slope", "query_decay", "key_decay", "diagonal_decay"),
    by_head=("value", "query", "key"),
    of_heads=("slope", "query_decay", "key_decay", "diagonal_decay"),
)


def lightning_attention(sequence: MixedSequence, *arguments: Tensor) -> Tensor:
    """`lightning_attention_of_document` for each document of the sequence alone, its heads divided among the ranks."""
    output: Tensor = _SCAN(sequence, lightning_attention_of_document, *arguments)
    return output


def lightning_attention_of_document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slope: Tensor,
    query_decay: Tensor,
    key_decay: Tensor,
    diagonal_decay: Tensor,
) -> Tensor:
    """Of one document, in the order of transformers' sums: what is before a block comes as one state, keys by values.

    Args:
        query, key, value: (B, L, N, D).
        slope: (N, 1, 1), by whose exponential the state decays with each token.
        query_decay, key_decay: (N, block, 1), of a token's query since the block's first token, and of its key until
            the last.
        diagonal_decay: (N, block, block), from key to query within a block, 0 where the key comes later.

    Returns:
        (B, L, N, D).
    """
    block = diagonal_decay.shape[-1]
    state = value.new_zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    outputs = []
    parts = [tensor.transpose(1, 2).split(block, dim=2) for tensor in (query, key, value)]
    for queries, keys, values in zip(*parts, strict=True):
        length = queries.shape[2]
        within = torch.matmul(queries, keys.transpose(-1, -2)) * diagonal_decay[:, :length, :length]
        before = torch.matmul(queries * query_decay[:, :length], state)
        outputs.append(before + torch.matmul(within, values))
        of_block = torch.matmul((keys * key_decay[:, -length:]).transpose(-1, -2), values)
        state = state * torch.exp(-slope * length) + of_block
    return torch.cat(outputs, dim=2).transpose(1, 2)

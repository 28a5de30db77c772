"""A sliding window over a kernel that takes masks: many blocks of queries in one call, in memory linear in S."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from mst_ds.geometry import window_queries

from .spec import AttentionSpec


def window_mask(query: Tensor, key: Tensor, spec: AttentionSpec) -> Tensor:
    """The mask that all blocks of `attend_in_windows` share, for these heads, their dtype and device.

    Returns:
        (n / k, block, front + window + block), added to the scores: query r of a block sees the front, and of the
        `window + block` keys that follow those from r + 1 to r + window, its own.
    """
    assert spec.window is not None
    window = spec.window
    block = window_queries(window)
    keys, rows = torch.arange(window + block, device=query.device), torch.arange(block, device=query.device)[:, None]
    hidden = pad((keys <= rows) | (keys > rows + window), (spec.front, 0))
    # In the kernel's own form: a mask of booleans would be turned into one of these for each call, and kept.
    mask = query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
    return mask.expand(query.shape[1] // key.shape[1], -1, -1).contiguous()


def attend_in_windows(
    attend: Callable[[Tensor, Tensor, Tensor, AttentionSpec], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    mask: Tensor,
) -> Tensor:
    """Attention with a sliding window, without softcap.

    The first `window` queries are plain causal attention. The others follow in blocks: each block sees the `window`
    keys before it and its own.

    Args:
        attend: plain causal attention.
        query: (B, n, S, D); key, value: (B, k, S, D) with k dividing n.
        mask: see `window_mask`.

    Returns:
        (B, n, S, D).
    """
    rows = [
        _attend_sequence(attend, *row, spec, mask)
        for row in zip(query.split(1), key.split(1), value.split(1), strict=True)
    ]
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def _attend_sequence(
    attend: Callable[[Tensor, Tensor, Tensor, AttentionSpec], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    mask: Tensor,
) -> Tensor:
    """`attend_in_windows` of one sequence."""
    assert spec.window is not None
    block, length = mask.shape[1], query.shape[2]
    start = min(spec.front + spec.window, length)
    stop = length - (length - start) % block
    parts = {0: attend(query[:, :, :start], key[:, :, :start], value[:, :, :start], spec)}
    # The many blocks last: autograd then begins with them, before it holds gradients of all queries and keys.
    for begin, end, size in ((stop, length, length - stop), (start, stop, block)):
        if begin < end:
            parts[begin] = _attend_blocks(query[:, :, begin:end], key[:, :, :end], value[:, :, :end], size, spec, mask)
    return torch.cat([parts[begin] for begin in sorted(parts)], dim=2)


def _attend_blocks(query: Tensor, key: Tensor, value: Tensor, size: int, spec: AttentionSpec, mask: Tensor) -> Tensor:
    """The queries (1, n, blocks * size, D) that stand at the end of key and value (1, k, S, D); -> as query."""
    keys, values = (_keys_of_blocks(x, query.shape[2], size, spec) for x in (key, value))
    mask = mask[:, :size, : keys.shape[2]]
    groups = mask.shape[0]
    # The query heads of a group become rows of one head: with a mask no kernel on CUDA groups heads by itself.
    queries = query[0].unflatten(1, (-1, size)).unflatten(0, (-1, groups)).permute(2, 0, 1, 3, 4).flatten(2, 3)
    output = scaled_dot_product_attention(
        queries, keys, values, mask.flatten(0, 1), dropout_p=spec.dropout, scale=spec.scaling
    )
    del queries  # a copy, where heads are grouped
    return output.unflatten(2, (groups, size)).permute(1, 2, 0, 3, 4).reshape(query.shape)


def _keys_of_blocks(tensor: Tensor, queries: int, size: int, spec: AttentionSpec) -> Tensor:
    """What each block of `size` queries sees of (1, k, S, D): (blocks, k, front + window + size, D)."""
    assert spec.window is not None
    window, length = spec.window, tensor.shape[2]
    # Overlapping views: without a front, neither the forward nor what is kept for the backward copies keys.
    blocks = tensor[0, :, length - queries - window :].unfold(1, window + size, size).permute(1, 0, 3, 2)
    if not spec.front:
        return blocks
    return torch.cat([tensor[:, :, : spec.front].expand(len(blocks), -1, -1, -1), blocks], dim=2)

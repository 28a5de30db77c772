"""The truth about attention: every score, an explicit mask, one softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def visible(length: int, window: int | None = None, starts: list[int] | None = None) -> Tensor:
    """(S, S), True where query i sees key j: not after i, within its window, in the same document."""
    i, j = torch.arange(length)[:, None], torch.arange(length)
    seen = j <= i
    if window is not None:
        seen = seen & (j > i - window)
    document = torch.zeros(length, dtype=torch.long)
    document[starts or [0]] = 1
    document = document.cumsum(0)
    return seen & (document[:, None] == document)


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: list[list[int]] | None = None,
) -> Tensor:
    """query (B, N, S, D), key (B, K, S, D), value (B, K, S, Dv) -> (B, S, N, Dv), in the dtype of the query."""
    asked = {"scaling": scaling, "window": window, "softcap": softcap, "sinks": sinks, "starts": starts}
    weights = scores_of(query, key, **asked).softmax(dim=3)[..., : query.shape[2]]
    return (weights @ value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)).transpose(1, 2)


def scores_of(
    query: Tensor,
    key: Tensor,
    *,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    starts: list[list[int]] | None = None,
) -> Tensor:
    """(B, N, S, S), with sinks (B, N, S, S + 1): what attention takes the softmax of; -inf where a key is not seen."""
    batch, heads, length, _ = query.shape
    scores = query @ key.repeat_interleave(heads // key.shape[1], dim=1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.stack([visible(length, window, row) for row in starts or [[0]] * batch])
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(batch, -1, length, 1)], dim=3)
    return scores


def heads(*counts: int, length: int, dims: tuple[int, ...] = (8,), batch: int = 2, **kwargs: Any) -> list[Tensor]:
    """Leaves (batch, count, length, dim) of random numbers, in fp64 unless `dtype` says otherwise."""
    dims = dims * (len(counts) if len(dims) == 1 else 1)
    kwargs = {"dtype": torch.float64, "requires_grad": True, **kwargs}
    return [torch.randn(batch, count, length, dim, **kwargs) for count, dim in zip(counts, dims, strict=True)]

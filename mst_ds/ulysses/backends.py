"""Causal attention on one device, over the kernels there are. No path builds an S x S mask."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CausalAttention = Callable[[Tensor, Tensor, Tensor, float | None, float], Tensor]


def causal_backend(name: str) -> CausalAttention:
    """The attention function called `name`: (B, n, S, D), (B, k, S, D), (B, k, S, D), scale, dropout -> (B, n, S, D).

    Raises:
        ValueError: an unknown name, or flash attention without its package.
    """
    if name == "sdpa":
        return _sdpa
    if name == "flash_attention_2":
        if find_spec("flash_attn") is None:
            raise ValueError('attention "flash_attention_2" needs the package flash-attn: install it, or use "sdpa"')
        return _flash_attention_2
    raise ValueError(f'attention must be "sdpa" or "flash_attention_2", got {name!r}')


def attend_within_documents(
    attend: CausalAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    document_starts: list[list[int]] | None,
) -> Tensor:
    """Causal attention that never crosses a document, in memory linear in S.

    Args:
        query: (B, n, S, D); key, value: (B, k, S, D) with k dividing n.
        document_starts: for each row of the batch the first position of each of its documents, 0 first; None when
            every row is one document.

    Returns:
        (B, n, S, D).
    """
    if document_starts is None:
        return attend(query, key, value, scaling, dropout)
    rows = []
    for row, starts in enumerate(document_starts):
        stops = [*starts[1:], query.shape[2]]
        parts = [
            attend(
                query[row : row + 1, :, start:stop],
                key[row : row + 1, :, start:stop],
                value[row : row + 1, :, start:stop],
                scaling,
                dropout,
            )
            for start, stop in zip(starts, stops, strict=True)
        ]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    if query.is_cuda and query.dtype == torch.float32:
        # The one kernel for fp32 on CUDA without an S x S matrix wants as many key/value heads as query heads.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _flash_attention_2(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float) -> Tensor:
    from flash_attn import flash_attn_func

    # The package's layout is (B, S, n, D).
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    output: Tensor = flash_attn_func(query, key, value, dropout_p=dropout, softmax_scale=scaling, causal=True)
    return output.transpose(1, 2)

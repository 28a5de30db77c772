"""Causal attention on one device, over the kernels there are. No path builds an S x S mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .blockwise import attend_blockwise
from .sinks import attend_with_sink_token
from .spec import AttentionSpec
from .windowed import attend_in_windows, window_mask

CausalAttention = Callable[[Tensor, Tensor, Tensor, AttentionSpec], Tensor]

# The widest head of the flash kernels, torch's and the package's.
_WIDEST_HEAD = 256


def causal_backend(name: str) -> CausalAttention:
    """The attention called `name`, for one call of one layer; query (B, n, S, D), key and value (B, k, S, D).

    Raises:
        ValueError: an unknown name, or flash attention without its package.
    """
    if name == "sdpa":
        return _Sdpa()
    if name == "flash_attention_2":
        if find_spec("flash_attn") is None:
            raise ValueError('attention "flash_attention_2" needs the package flash-attn: install it, or use "sdpa"')
        return _FlashAttention2()
    raise ValueError(f'attention must be "sdpa" or "flash_attention_2", got {name!r}')


def attend_within_documents(
    attend: CausalAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    document_starts: list[list[int]] | None,
) -> Tensor:
    """Causal attention that never crosses a document, in memory linear in S.

    Args:
        query: (B, n, S, D); key: (B, k, S, D); value: (B, k, S, Dv) with k dividing n.
        document_starts: for each row of the batch the first position of each of its documents, 0 first; None when
            every row is one document, a list of one for all rows alike.

    Returns:
        (B, n, S, Dv).
    """
    value_dim = value.shape[3]
    width = max(query.shape[3], value_dim)
    # Kernels without an S x S matrix want one width.
    query, key, value = (pad(x, (0, width - x.shape[3])) if x.shape[3] < width else x for x in (query, key, value))
    if document_starts is None:
        return _attend_document(attend, query, key, value, spec)[..., :value_dim]
    document_starts = document_starts * query.shape[0] if len(document_starts) == 1 else document_starts
    outputs = []
    # Splits, not slices: the gradient of a split is put together once, that of each slice is as long as the whole.
    for row, starts in zip(
        zip(query.split(1), key.split(1), value.split(1), strict=True), document_starts, strict=True
    ):
        stops = [*starts[1:], query.shape[2]]
        lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
        documents = zip(*(tensor.split(lengths, dim=2) for tensor in row), strict=True)
        outputs.append(torch.cat([_attend_document(attend, q, k, v, spec) for q, k, v in documents], dim=2))
    return torch.cat(outputs)[..., :value_dim]


def _attend_document(attend: CausalAttention, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    if spec.window is not None and spec.window >= query.shape[2]:
        spec = replace(spec, window=None)
    return attend(query, key, value, spec)


class _Sdpa:
    """torch's kernels. A window's mask is made once, for all documents."""

    def __init__(self) -> None:
        self._mask: Tensor | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        # On the CPU no kernel drops out, on CUDA none computes in fp64: torch would build the S x S scores.
        no_kernel = query.dtype == torch.float64 if query.is_cuda else spec.dropout > 0
        if spec.softcap is not None or no_kernel:
            return attend_blockwise(query, key, value, spec)
        if spec.sinks is not None:
            return attend_with_sink_token(self, query, key, value, spec)
        if spec.window is None:
            return _sdpa_causal(query, key, value, spec)
        if self._mask is None:
            self._mask = window_mask(query, key, spec)
        return attend_in_windows(_sdpa_causal, query, key, value, spec, self._mask)


def _sdpa_causal(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    if query.is_cuda and (query.dtype == torch.float32 or query.shape[3] > _WIDEST_HEAD):
        # The one kernel for these on CUDA without an S x S matrix wants as many key/value heads as query heads.
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=spec.dropout,
        is_causal=True,
        scale=spec.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


class _FlashAttention2:
    """The package flash-attn, and what `_Sdpa` uses for what the package does not do."""

    def __init__(self) -> None:
        self._sdpa = _Sdpa()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        if spec.softcap is not None and (spec.dropout or spec.sinks is not None):
            return attend_blockwise(query, key, value, spec)
        if spec.sinks is not None:
            return attend_with_sink_token(self, query, key, value, spec)
        if query.shape[3] > _WIDEST_HEAD or (spec.front and spec.window is not None):
            return self._sdpa(query, key, value, spec)
        from flash_attn import flash_attn_func

        # The package's layout is (B, S, n, D); its window counts the tokens to the left and right of a query's own.
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        output: Tensor = flash_attn_func(
            query,
            key,
            value,
            dropout_p=spec.dropout,
            softmax_scale=spec.scaling,
            causal=True,
            window_size=(-1, -1) if spec.window is None else (spec.window - 1, 0),
            softcap=spec.softcap or 0.0,
        )
        return output.transpose(1, 2)

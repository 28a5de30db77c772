"""Causal attention on one device, over the kernels there are. No path builds an S x S mask."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mst_ds.geometry import WIDEST_FLASH_HEAD

from .blockwise import attend_blockwise
from .sinks import attend_with_sink_token
from .spec import AttentionSpec
from .windowed import attend_in_windows, window_mask

CausalAttention = Callable[[Tensor, Tensor, Tensor, AttentionSpec], Tensor]


def causal_backend(name: str) -> CausalAttention:
    """The attention called `name`, for one forward of a model; query (B, n, S, D), key and value (B, k, S, D).

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


class _Sdpa:
    """torch's kernels. A window's mask is made once, for all layers and documents."""

    def __init__(self) -> None:
        self._masks: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        # On the CPU no kernel drops out, on CUDA none computes in fp64: torch would build the S x S scores.
        no_kernel = query.dtype == torch.float64 if query.is_cuda else spec.dropout > 0
        if spec.softcap is not None or no_kernel:
            return attend_blockwise(query, key, value, spec)
        if spec.sinks is not None:
            return attend_with_sink_token(self, query, key, value, spec)
        if spec.window is None:
            return _sdpa_causal(query, key, value, spec)
        # Groups of heads may differ in how many query heads share a key.
        kind = spec.window, spec.front, query.shape[1] // key.shape[1], query.dtype, query.device
        if kind not in self._masks:
            self._masks[kind] = window_mask(query, key, spec)
        return attend_in_windows(_sdpa_causal, query, key, value, spec, self._masks[kind])


def _sdpa_causal(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    if query.is_cuda and (query.dtype == torch.float32 or query.shape[3] > WIDEST_FLASH_HEAD):
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
        if query.shape[3] > WIDEST_FLASH_HEAD or (spec.front and spec.window is not None):
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

"""Attention that no kernel computes, such as softcapped scores, in plain torch and in memory linear in S."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import block_queries

from .spec import AttentionSpec


def attend_blockwise(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """Attention by blocks of queries, of which only one's scores are alive at a time, in the backward too.

    The backward computes each block's scores again. Softmax and the sums of gradients over blocks are in fp32 at least.

    Args:
        query: (B, n, S, D); key: (B, k, S, D); value: (B, k, S, Dv) with k dividing n.

    Returns:
        (B, n, S, Dv).
    """
    assert not spec.front
    # Dropout masks follow from this number, so that they are the same when a block is computed again.
    seed = int(torch.randint(2**62, ())) if spec.dropout else 0
    tensors = (query, key, value) if spec.sinks is None else (query, key, value, spec.sinks)
    return _Blockwise.apply(replace(spec, sinks=None), seed, *tensors)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: AttentionSpec, seed: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.spec, ctx.seed = spec, seed
        query, value = tensors[0], tensors[2]
        generator = torch.Generator(query.device).manual_seed(seed)
        output = query.new_empty(*query.shape[:3], value.shape[3])
        for parts in _blocks(query.shape[2], spec.window):
            block = [tensor[part] for tensor, part in zip(tensors, parts, strict=False)]
            output[parts[0]] = _attend_block(spec, generator, *block)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        query = tensors[0]
        generator = torch.Generator(query.device).manual_seed(ctx.seed)
        # A query is in one block; the gradients of the others are sums over blocks.
        dtypes = [query.dtype, *(sum_dtype(tensor.dtype) for tensor in tensors[1:])]
        sums = [torch.zeros_like(tensor, dtype=dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
        for parts in _blocks(query.shape[2], ctx.spec.window):
            block = [tensor[part].detach() for tensor, part in zip(tensors, parts, strict=False)]
            for tensor in block:
                tensor.requires_grad_()
            with torch.enable_grad():
                output = _attend_block(ctx.spec, generator, *block)
            grads = torch.autograd.grad(output, block, grad_output[parts[0]])
            for total, part, grad in zip(sums, parts, grads, strict=False):
                total[part] += grad
            del output, grads  # before the next block's scores
        return None, None, *(total.to(tensor.dtype) for total, tensor in zip(sums, tensors, strict=True))


def _blocks(length: int, window: int | None) -> Iterator[tuple[Any, ...]]:
    """For each block the index of its part of query, key, value and sinks."""
    reach = length if window is None else window
    size = block_queries(reach)
    for start in range(0, length, size):
        stop = min(start + size, length)
        rows, keys = slice(start, stop), slice(max(0, start - reach + 1), stop)
        yield (..., rows, slice(None)), (..., keys, slice(None)), (..., keys, slice(None)), ...


def _attend_block(
    spec: AttentionSpec,
    generator: torch.Generator,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None = None,
) -> Tensor:
    """Queries (B, n, b, D), keys (B, k, c, D) and values (B, k, c, Dv) up to the last query -> (B, n, b, Dv)."""
    (batch, heads, rows, _), (_, kv_heads, columns, _) = query.shape, key.shape
    groups, wide = heads // kv_heads, sum_dtype(query.dtype)
    # The query heads of a group are rows of one product with their key/value head.
    scores = torch.matmul(query.reshape(batch, kv_heads, groups * rows, -1), key.transpose(2, 3)).to(wide)
    scores = scores * spec.scaling
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.unflatten(2, (groups, rows)).masked_fill(_hidden(rows, columns, spec.window, query), float("-inf"))
    weights = scores.softmax(dim=-1)
    if spec.dropout:
        kept = torch.empty_like(weights, dtype=torch.bool).bernoulli_(1 - spec.dropout, generator=generator)
        weights = weights * kept / (1 - spec.dropout)
    if sinks is not None:
        # The part of the softmax's denominator that is not the sink's.
        share = torch.sigmoid(scores.logsumexp(dim=-1) - sinks.to(wide).view(kv_heads, groups, 1))
        weights = weights * share[..., None]
    output = torch.matmul(weights.to(value.dtype).flatten(2, 3), value)
    return output.unflatten(2, (groups, rows)).flatten(1, 2)


def _hidden(rows: int, columns: int, window: int | None, like: Tensor) -> Tensor:
    """(b, c), True where a query does not see a key; the last query stands at the last key."""
    keys = torch.arange(columns, device=like.device)
    positions = torch.arange(columns - rows, columns, device=like.device)[:, None]
    hidden = keys > positions
    return hidden if window is None else hidden | (keys <= positions - window)

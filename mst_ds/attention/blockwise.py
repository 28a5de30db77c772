"""Attention that no kernel computes, such as softcapped scores, in plain torch and in memory linear in S."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import block_queries

from .kernel import Attended, Draw, Gradients
from .spec import AttentionSpec


@dataclass(frozen=True)
class Blockwise:
    """A `DocumentKernel` by blocks of queries, of which only one's scores are alive at a time, in the backward too.

    The backward computes each block's scores again. Softmax and the sums of gradients over blocks are in fp32 at least.
    Inside, the query heads of a group are rows of one product with their key/value head: (B, k, n / k * block, ...).

    Args:
        is_causal: else all queries see all keys.
    """

    is_causal: bool = True

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Attended:
        # Dropout masks follow from this number, so that they are the same when a block is computed again.
        draw = (torch.randint(2**62, ()),) if spec.dropout else ()
        generator = _generator(draw, query)
        output = torch.empty_like(query)
        log_sum_exp = query.new_empty(query.shape[:3], dtype=sum_dtype(query.dtype))
        for rows, keys in _blocks(query, key, spec.window, self.is_causal):
            weights = _scores(query[:, :, rows], key[:, :, keys], spec)
            if spec.softcap is not None:
                weights.div_(spec.softcap).tanh_().mul_(spec.softcap)
            if self.is_causal:
                _hide(weights, query[:, :, rows], key[:, :, keys], spec.window)
            of_block = weights.logsumexp(dim=-1, keepdim=True)
            weights.sub_(of_block).exp_()
            if generator is not None:
                weights.mul_(_kept(weights, spec.dropout, generator))
            output[:, :, rows] = _unfolded(weights.to(value.dtype) @ value[:, :, keys], query)
            log_sum_exp[:, :, rows] = _unfolded(of_block, query)[..., 0]
            del weights  # before the next block's
        return Attended(output, log_sum_exp, [draw])

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, spec: AttentionSpec
    ) -> Gradients:
        generator = _generator(next(iter(attended.draws)), query)
        # A query is in one block; the gradients of keys and values are sums over blocks.
        wide = sum_dtype(query.dtype)
        of_query, of_key, of_value = torch.empty_like(query), *(torch.zeros_like(x, dtype=wide) for x in (key, value))
        for rows, keys in _blocks(query, key, spec.window, self.is_causal):
            weights, slope = _scores(query[:, :, rows], key[:, :, keys], spec), None
            if spec.softcap is not None:
                slope = weights.div_(spec.softcap).tanh_().square().neg_().add_(1)
                weights.mul_(spec.softcap)
            if self.is_causal:
                _hide(weights, query[:, :, rows], key[:, :, keys], spec.window)
            weights.sub_(_folded(attended.log_sum_exp[:, :, rows, None], key)).exp_()
            grad = _folded(grad_output[:, :, rows], key)
            of_weights = (grad @ value[:, :, keys].transpose(2, 3)).to(wide)
            used = weights
            if generator is not None:
                kept = _kept(weights, spec.dropout, generator)
                of_weights.mul_(kept)
                used = kept.mul_(weights)
            of_value[:, :, keys] += used.to(value.dtype).transpose(2, 3) @ grad
            # The softmax takes the mean of its weights' gradients off: that of the output along the output.
            mean = (grad.to(wide) * _folded(attended.output[:, :, rows], key)).sum(dim=-1, keepdim=True)
            of_weights.sub_(mean).mul_(weights).mul_(spec.scaling)
            of_scores = (of_weights if slope is None else of_weights.mul_(slope)).to(query.dtype)
            of_query[:, :, rows] = _unfolded(of_scores @ key[:, :, keys], query)
            of_key[:, :, keys] += of_scores.transpose(2, 3) @ _folded(query[:, :, rows], key)
            del weights, slope, of_weights, used, of_scores  # before the next block's
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype)


def _blocks(query: Tensor, key: Tensor, window: int | None, is_causal: bool) -> Iterator[tuple[slice, slice]]:
    """For each block its queries, and the keys that it sees."""
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    reach, first = keys if window is None else window, keys - queries
    size = block_queries(keys, batch * heads, window=window, on_cpu=is_on_cpu(query))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        seen = slice(max(0, first + start - reach + 1), first + stop) if is_causal else slice(0, keys)
        yield slice(start, stop), seen


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether blocks are those of a CPU."""
    return tensor.device.type == "cpu"


def _scores(query: Tensor, key: Tensor, spec: AttentionSpec) -> Tensor:
    """(B, k, n / k * b, c)."""
    return (_folded(query, key) @ key.transpose(2, 3)).to(sum_dtype(query.dtype)).mul_(spec.scaling)


def _hide(scores: Tensor, query: Tensor, key: Tensor, window: int | None) -> None:
    """Write -inf where a key is hidden from a query; the last query stands at the last key."""
    rows, columns = query.shape[2], key.shape[2]
    keys = torch.arange(columns, device=query.device)
    positions = torch.arange(columns - rows, columns, device=query.device)[:, None]
    hidden = keys > positions
    if window is not None:
        hidden |= keys <= positions - window
    scores.unflatten(2, (-1, rows)).masked_fill_(hidden, float("-inf"))


def _folded(of_queries: Tensor, key: Tensor) -> Tensor:
    """(B, n, b, D) -> (B, k, n / k * b, D)."""
    batch, kv_heads = key.shape[:2]
    return of_queries.reshape(batch, kv_heads, -1, of_queries.shape[3])


def _unfolded(folded: Tensor, query: Tensor) -> Tensor:
    """(B, k, n / k * b, D) -> (B, n, b, D)."""
    return folded.reshape(*query.shape[:2], -1, folded.shape[3])


def _kept(like: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """0 for each weight that is dropped, and the factor of the others."""
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


def _generator(draw: Draw, query: Tensor) -> torch.Generator | None:
    return torch.Generator(query.device).manual_seed(int(draw[0])) if draw else None

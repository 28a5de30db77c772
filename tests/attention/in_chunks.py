"""Attention of a sequence chunk by chunk, as a layer's stream asks for it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from mst_ds.attention import AttentionSpec, CausalAttention, KeyBlock
from mst_ds.dtypes import sum_dtype


class Blocks:
    """Keys and values of the tokens before a position in blocks, the last first, which may reach beyond the position.

    Each is a copy that is made when it is asked for: by then the one before it must be gone.
    """

    def __init__(self, key: Tensor, value: Tensor, stop: int, size: int) -> None:
        self._key, self._value, self._stop, self._size = key, value, stop, size

    def __iter__(self) -> Iterator[KeyBlock]:
        last: weakref.ref[Tensor] | None = None
        for first in reversed(range(0, self._stop, self._size)):
            assert last is None or last() is None
            tokens = slice(first, first + self._size)
            made = [KeyBlock(first, self._key[:, :, tokens].clone(), self._value[:, :, tokens].clone())]
            last = weakref.ref(made[0].key)
            yield made.pop()


def attend_in_chunks(
    attention: CausalAttention,
    tensors: list[Tensor],
    grad: Tensor,
    spec: AttentionSpec,
    borders: list[int],
    block_size: int,
    seed: int | None = None,
) -> list[Tensor]:
    """Output (B, n, S, Dv), log-sum-exp and the gradients of query, key, value and of sinks if given.

    Args:
        tensors: query, key, value and, or not, sinks, of the whole sequence.
        borders: of chunks, which go backward in the last chunk's place first.
        seed: of each chunk's forward.
    """
    query, key, value, *sinks = (x.detach() for x in tensors)
    wide = sum_dtype(query.dtype)
    grads = [torch.zeros_like(x, dtype=wide) for x in (query, key, value, *sinks)]

    def add(tokens: slice, of_key: Tensor, of_value: Tensor) -> None:
        earlier = attention.earlier_keys(chunk, spec)
        assert earlier.start <= tokens.start < tokens.stop <= earlier.stop
        assert of_key.shape[2] == tokens.stop - tokens.start
        grads[1][:, :, tokens] += of_key
        grads[2][:, :, tokens] += of_value

    chunks, found = [slice(*pair) for pair in pairwise(borders)], []
    for chunk in chunks:
        if seed is not None:
            torch.manual_seed(seed + chunk.start)
        own = [x[:, :, chunk] for x in (query, key, value)]
        found.append(attention.forward_chunk(chunk, *own, Blocks(key, value, chunk.start, block_size), spec, *sinks))
    for chunk, attended in zip(reversed(chunks), reversed(found), strict=True):
        own, earlier = [x[:, :, chunk] for x in (query, key, value)], Blocks(key, value, chunk.start, block_size)
        of_chunk = attention.backward_chunk(
            chunk, grad[:, :, chunk], *own, earlier, attended, spec, sinks[0] if sinks else None, add
        )
        for total, part in zip(grads[:3], of_chunk[:3], strict=True):
            total[:, :, chunk] += part
        for total, part in zip(grads[3:], of_chunk[3:], strict=True):
            total.add_(part)
    outputs, sums = (torch.cat(parts, dim=2) for parts in zip(*((x.output, x.log_sum_exp) for x in found), strict=True))
    return [outputs, sums, *grads]

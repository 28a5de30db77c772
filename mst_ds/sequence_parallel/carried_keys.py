"""Keys and values that attention carries from chunk to chunk of a layer, and their gradients on the way back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mst_ds.attention import KeyBlock
from mst_ds.dtypes import sum_dtype
from mst_ds.recompute import Kept, PartStore, read_in_turn


class CarriedKeys:
    """Those of one group of heads in one call of a layer.

    In the forward they lie in one buffer, of which attention reads all earlier tokens at once; with a window, which
    reads few, by chunks. What is kept of them lies by chunks, on the device as views of the buffer. The gradients, in
    fp32 at least, are summed over the chunks that read a key, and are complete when its own chunk's turn comes.

    Args:
        spans: of each chunk the tokens of the whole sequence, (start, stop).
        by_chunk: blocks are those of chunks in the forward, too.
    """

    def __init__(self, spans: Sequence[slice], *, by_chunk: bool) -> None:
        self._spans, self._by_chunk = spans, by_chunk
        self._buffer: tuple[Tensor, Tensor] | None = None
        self._blocks: dict[int, tuple[Tensor, Tensor]] = {}
        self._kept: dict[int, tuple[Kept, Kept]] = {}
        self._gradients: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, chunk: int, key: Tensor, value: Tensor) -> None:
        """Those of a chunk, (B, k, c, D) and (B, k, c, Dv)."""
        # Nobody reads the last chunk's but itself.
        if chunk < len(self._spans) - 1 and not self._by_chunk:
            if self._buffer is None:
                length = self._spans[-1].start
                self._buffer = _with_length(key, length), _with_length(value, length)
            span = self._spans[chunk]
            key, value = (
                whole[:, :, span].copy_(of_chunk) for whole, of_chunk in zip(self._buffer, (key, value), strict=True)
            )
        self._blocks[chunk] = key, value

    def keep(self, chunk: int, part: PartStore) -> None:
        """Keep those of a chunk for the backward."""
        # Without the buffer's count of writes: later chunks are written beside these.
        key, value = (tensor.data for tensor in self._blocks[chunk])
        self._kept[chunk] = part.keep(key, is_shared=True), part.keep(value, is_shared=True)

    def has(self, chunk: int) -> bool:
        """Whether those of a chunk are on the device, of which nothing is kept."""
        return chunk in self._blocks

    def missing(self, tokens: slice) -> list[int]:
        """The chunks that have some of these tokens, of which nothing is on the device."""
        return [chunk for chunk, _ in self._of_chunks(tokens) if chunk not in self._blocks]

    def of(self, chunk: int) -> tuple[Tensor, Tensor]:
        """Those of a chunk that are on the device."""
        return self._blocks[chunk]

    def forget(self, tokens: slice) -> None:
        """No chunk to come reads keys before `tokens`."""
        for chunk in [chunk for chunk in self._blocks if self._spans[chunk].stop <= tokens.start]:
            del self._blocks[chunk]

    def drop(self) -> None:
        """Nothing is read again but what is kept."""
        self._buffer = None
        self._blocks.clear()

    def end(self, chunk: int) -> None:
        """The gradients of a chunk are there: nobody reads its keys any more."""
        for known in (self._blocks, self._kept):
            known.pop(chunk, None)

    def earlier(self, tokens: slice, *, by_chunk: bool) -> Iterator[KeyBlock]:
        """Blocks that have these tokens, all of chunks before the one that runs.

        Args:
            by_chunk: a block is no longer than a chunk.
        """
        if tokens.start >= tokens.stop:
            return
        if self._buffer is not None and not by_chunk:
            key, value = self._buffer
            yield KeyBlock(tokens.start, key[:, :, tokens], value[:, :, tokens])
            return
        chunks = [chunk for chunk, _ in self._of_chunks(tokens)]
        if self._kept:
            reads = read_in_turn([self._kept[chunk] for chunk in chunks])
            for chunk in chunks:
                # Not held here, while the next ones are on their way.
                yield KeyBlock(self._spans[chunk].start, *next(reads))
            return
        for chunk in chunks:
            yield KeyBlock(self._spans[chunk].start, *self._blocks[chunk])

    def add(self, tokens: slice, d_key: Tensor, d_value: Tensor) -> None:
        """Add gradients of some tokens' keys and values."""
        for chunk, part in self._of_chunks(tokens):
            span = self._spans[chunk]
            grads = [grad[:, :, part.start - tokens.start : part.stop - tokens.start] for grad in (d_key, d_value)]
            if chunk not in self._gradients and part == span:
                self._gradients[chunk] = _unrounded(grads[0]), _unrounded(grads[1])
                continue
            if chunk not in self._gradients:
                length = span.stop - span.start
                self._gradients[chunk] = _zeros(grads[0], length), _zeros(grads[1], length)
            for total, grad in zip(self._gradients[chunk], grads, strict=True):
                total[:, :, part.start - span.start : part.stop - span.start] += grad

    def complete(self, chunk: int, d_key: Tensor, d_value: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of a chunk's keys and values, of which its own queries' part is given; rounded once."""
        totals = self._gradients.pop(chunk, None)
        if totals is None:
            return d_key, d_value
        return totals[0].add_(d_key).to(d_key.dtype), totals[1].add_(d_value).to(d_value.dtype)

    def _of_chunks(self, tokens: slice) -> Iterator[tuple[int, slice]]:
        """The chunks that have some of these tokens, and which."""
        for chunk, span in enumerate(self._spans):
            part = slice(max(span.start, tokens.start), min(span.stop, tokens.stop))
            if part.start < part.stop:
                yield chunk, part


def _with_length(like: Tensor, length: int) -> Tensor:
    return like.new_empty(*like.shape[:2], length, like.shape[3])


def _zeros(like: Tensor, length: int) -> Tensor:
    return torch.zeros(*like.shape[:2], length, like.shape[3], dtype=sum_dtype(like.dtype), device=like.device)


def _unrounded(grad: Tensor) -> Tensor:
    return grad.to(sum_dtype(grad.dtype), copy=True)

"""Causal attention and sliding windows of one document over a kernel of blocks, in memory linear in S."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import ceil_divide, window_queries

from .kernel import Attended, Block, BlockKernel, Draw, Gradients
from .merging import merge
from .spec import AttentionSpec
from .torch_kernels import MASK_STEP


@dataclass(frozen=True)
class Piece:
    """A range of queries, and the keys that they see: each those up to its own, or in blocks of `size` queries, all of
    them in one call, each block the window before it and its own."""

    queries: slice
    keys: slice
    size: int = 0

    @property
    def places(self) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """In tensors of queries, and of keys."""
        everything = slice(None)
        return (everything, everything, self.queries), (everything, everything, self.keys)


@dataclass(frozen=True)
class OverBlocks:
    """A `DocumentKernel` over a `BlockKernel`.

    Without a window it is one causal block; where there are more keys than queries, the earlier keys are a block of
    their own without a mask, merged by its log-sum-exp. With a window the first queries are plain causal attention.
    The others follow in blocks, many in one call: each block sees the window before it and its own.

    Args:
        kernel: for a block.
        masks: of windows, made once for all layers and documents.
    """

    kernel: BlockKernel
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Attended:
        if not _has_blocks(key, spec):
            return self._forward_causal(query, key, value, spec)
        batch, heads, length, width = query.shape
        # A token's heads lie beside each other, as the output projection takes them.
        output = query.new_empty(batch, length, heads, width).transpose(1, 2)
        log_sum_exp = query.new_empty(batch, heads, length, dtype=sum_dtype(query.dtype))
        draws: list[Draw] = []
        for piece in _pieces(length, key.shape[2], spec.window):
            rows, keys = piece.places
            given = query[rows], key[keys], value[keys]
            if piece.size:
                into = output[rows], log_sum_exp[:, :, piece.queries]
                draws.extend(self._attend_in_blocks(piece.size, *given, spec, *into))
                continue
            found = self._forward_causal(*given, spec)
            output[rows], log_sum_exp[:, :, piece.queries] = found.output, found.log_sum_exp
            draws.extend(found.draws)
            del found  # before the next piece's
        return Attended(output, log_sum_exp, draws)

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, spec: AttentionSpec
    ) -> Gradients:
        if not _has_blocks(key, spec):
            return self._backward_causal(grad_output, query, key, value, attended, spec)
        # A query is in one piece; keys are in several.
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=sum_dtype(x.dtype)) for x in (key, value))
        draws = iter(attended.draws)
        for piece in _pieces(query.shape[2], key.shape[2], spec.window):
            rows, keys = piece.places
            given = grad_output[rows], query[rows], key[keys], value[keys]
            part = Attended(attended.output[rows], attended.log_sum_exp[:, :, piece.queries], draws)
            if piece.size:
                self._add_gradients_of_blocks(
                    piece.size, *given, part, spec, of_query[rows], of_key[keys], of_value[keys]
                )
                continue
            found = self._backward_causal(*given, part, spec)
            of_query[rows] = found[0]
            of_key[keys] += found[1]
            of_value[keys] += found[2]
            del found
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype)

    def _forward_causal(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Attended:
        before = key.shape[2] - query.shape[2]
        own = self.kernel.forward(query, key[:, :, before:], value[:, :, before:], _block(spec, is_causal=True))
        if not before:
            return own
        return merge(own, self.kernel.forward(query, key[:, :, :before], value[:, :, :before], _block(spec)))

    def _backward_causal(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, spec: AttentionSpec
    ) -> Gradients:
        before = key.shape[2] - query.shape[2]
        attended = Attended(attended.output, attended.log_sum_exp, iter(attended.draws))
        own = key[:, :, before:], value[:, :, before:]
        found = self.kernel.backward(grad_output, query, *own, attended, _block(spec, is_causal=True))
        if not before:
            return found
        earlier = key[:, :, :before], value[:, :, :before]
        further = self.kernel.backward(grad_output, query, *earlier, attended, _block(spec))
        of_key, of_value = (torch.cat([further[index], found[index]], dim=2) for index in (1, 2))
        return found[0] + further[0], of_key, of_value

    def _attend_in_blocks(
        self,
        size: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: AttentionSpec,
        output: Tensor,
        log_sum_exp: Tensor,
    ) -> list[Draw]:
        """Write output and log-sum-exp of queries in blocks; rows of the batch go one by one."""
        block = _block(spec, mask=self._mask(size, query, key, spec))
        draws: list[Draw] = []
        for row in range(len(query)):
            found = self.kernel.forward(*_in_blocks(size, spec, query[row], key[row], value[row]), block)
            results = (output[row], found.output), (log_sum_exp[row, ..., None], found.log_sum_exp[..., None])
            for target, of_blocks in results:
                _grouped(target, size, key.shape[1]).copy_(of_blocks.unflatten(2, (-1, size)))
            draws.extend(found.draws)
            del found, results
        return draws

    def _add_gradients_of_blocks(
        self,
        size: int,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attended: Attended,
        spec: AttentionSpec,
        of_query: Tensor,
        of_key: Tensor,
        of_value: Tensor,
    ) -> None:
        """Write the gradients of queries in blocks, and add those of their keys and values."""
        block = _block(spec, mask=self._mask(size, query, key, spec))
        draws = iter(attended.draws)
        for row in range(len(query)):
            given = _in_blocks(size, spec, query[row], key[row], value[row])
            grad, output, log_sum_exp = (
                _grouped(x[row], size, key.shape[1]).flatten(2, 3)
                for x in (grad_output, attended.output, attended.log_sum_exp[..., None])
            )
            found = self.kernel.backward(grad, *given, Attended(output, log_sum_exp[..., 0], draws), block)
            del given, grad, output  # copies, where heads are grouped
            _grouped(of_query[row], size, key.shape[1]).copy_(found[0].unflatten(2, (-1, size)))
            _add_overlapping(of_key[row], found[1], size)
            _add_overlapping(of_value[row], found[2], size)
            del found

    def _mask(self, size: int, query: Tensor, key: Tensor, spec: AttentionSpec) -> Tensor:
        """(n / k * size, window + size), added to the scores: query r of a block sees the keys from r + 1 to
        r + window, its own."""
        assert spec.window is not None
        # Groups of heads may differ in how many query heads share a key.
        groups, window = query.shape[1] // key.shape[1], spec.window
        kind = window, groups, query.dtype, query.device
        if kind not in self.masks:
            most = window_queries(window)
            keys = torch.arange(window + most, device=query.device)
            rows = torch.arange(most, device=query.device)[:, None]
            hidden = (keys <= rows) | (keys > rows + window)
            # In the kernel's own form: a mask of booleans would be turned into one of these for each call.
            mask = query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
            self.masks[kind] = _aligned(mask.expand(groups, -1, -1))
        mask = self.masks[kind].unflatten(0, (groups, -1))[:, :size, : window + size]
        return mask.flatten(0, 1) if mask.shape[1] == window_queries(window) else _aligned(mask)


@dataclass(frozen=True)
class AllKeys:
    """A `DocumentKernel` whose queries see all keys, which are one block."""

    kernel: BlockKernel

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Attended:
        return self.kernel.forward(query, key, value, _block(spec))

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, spec: AttentionSpec
    ) -> Gradients:
        return self.kernel.backward(grad_output, query, key, value, attended, _block(spec))


def _aligned(mask: Tensor) -> Tensor:
    """(groups, queries, keys) -> (groups * queries, keys), its rows as far apart as kernels want them."""
    groups, queries, keys = mask.shape
    rows = mask.new_empty(groups * queries, ceil_divide(keys, MASK_STEP) * MASK_STEP)[:, :keys]
    rows.unflatten(0, (groups, queries)).copy_(mask)
    return rows


def _pieces(queries: int, keys: int, window: int | None) -> Iterator[Piece]:
    """In the order of the queries."""
    before = keys - queries
    if window is None or window >= keys:
        yield Piece(slice(0, queries), slice(0, keys))
        return
    size, start = window_queries(window), max(0, window - before)
    stop = queries - (queries - start) % size
    if start:
        yield Piece(slice(0, start), slice(0, before + start))
    for begin, end, size_there in ((start, stop, size), (stop, queries, queries - stop)):
        if begin < end:
            yield Piece(slice(begin, end), slice(before + begin - window, before + end), size_there)


def _block(spec: AttentionSpec, *, is_causal: bool = False, mask: Tensor | None = None) -> Block:
    return Block(spec.scaling, spec.dropout, is_causal, mask)


def _has_blocks(key: Tensor, spec: AttentionSpec) -> bool:
    return spec.window is not None and spec.window < key.shape[2]


def _grouped(of_row: Tensor, size: int, kv_heads: int) -> Tensor:
    """(n, blocks * size, D) -> (blocks, k, n / k, size, D), a view."""
    return of_row.unflatten(1, (-1, size)).unflatten(0, (kv_heads, -1)).permute(2, 0, 1, 3, 4)


def _in_blocks(
    size: int, spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of one row: queries (blocks, k, n / k * size, D), and the keys and values that each block sees,
    (blocks, k, window + size, D), which are overlapping views.

    The query heads of a group become rows of one head, as no kernel on CUDA groups heads itself where it has a mask.
    """
    assert spec.window is not None
    reach = spec.window + size
    keys, values = (x.unfold(1, reach, size).permute(1, 0, 3, 2) for x in (key, value))
    return _grouped(query, size, len(key)).flatten(2, 3), keys, values


def _add_overlapping(total: Tensor, of_blocks: Tensor, size: int) -> None:
    """Add gradients of what each block sees, (blocks, k, reach, D), to those of all keys, (k, T, D)."""
    for start in range(0, of_blocks.shape[2], size):
        # What stands at this place in its block: ranges of keys that do not overlap.
        part = of_blocks[:, :, start : start + size]
        places = total[:, start:].unfold(1, part.shape[2], size)[:, : len(of_blocks)]
        places.add_(part.permute(1, 0, 3, 2))

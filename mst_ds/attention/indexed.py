"""Causal attention in which an indexer has picked the keys of each query (DeepSeek V3.2), in memory linear in S."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import ceil_divide, masked_queries

from .blockwise import is_on_cpu
from .documents import Documents
from .kernel import Attended, Block, BlockKernel, Draw, Gradients, Kernel
from .spec import AttentionSpec
from .torch_kernels import MASK_STEP


@dataclass(frozen=True)
class Indexed:
    """A `Kernel` over two others.

    A query that has no more keys before it in its document than are picked sees all of them. So the first queries of a
    document are plain causal attention; the others follow in blocks, each with a mask of its own: no mask is S x S.

    Args:
        plain: for the first queries, of one document in each row.
        block: for the others.
        picks: (B, S, k) for each query the positions of its keys in the sequence. A position that is not an earlier one
            of the query's document, or its own, is none.
    """

    plain: Kernel
    block: BlockKernel
    picks: Tensor

    def forward(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, documents: Documents) -> Attended:
        batch, heads, length, width = query.shape
        # A token's heads lie beside each other, as the output projection takes them.
        output = query.new_empty(batch, length, heads, width).transpose(1, 2)
        log_sum_exp = query.new_empty(batch, heads, length, dtype=sum_dtype(query.dtype))
        draws: list[Draw] = []
        for rows, queries, keys, has_mask in _pieces(key, documents, self.picks.shape[2]):
            given = query[rows, :, queries], key[rows, :, keys], value[rows, :, keys]
            if has_mask:
                # No name holds a mask, which would live on beside the next one.
                found = self.block.forward(
                    _folded(given[0], key), *given[1:], self._block(rows, queries, keys, query, key, spec)
                )
            else:
                found = self.plain.forward(*given, spec, Documents())
            output[rows, :, queries] = _unfolded(found.output, given[0])
            log_sum_exp[rows, :, queries] = _unfolded(found.log_sum_exp[..., None], given[0])[..., 0]
            draws.extend(found.draws)
            del found  # before the next piece's
        return Attended(output, log_sum_exp, draws)

    def backward(
        self,
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attended: Attended,
        spec: AttentionSpec,
        documents: Documents,
    ) -> Gradients:
        # A query is in one piece; keys are in several.
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x, dtype=sum_dtype(x.dtype)) for x in (key, value))
        draws = iter(attended.draws)
        for rows, queries, keys, has_mask in _pieces(key, documents, self.picks.shape[2]):
            here, there = (rows, slice(None), queries), (rows, slice(None), keys)
            output, log_sum_exp, grad = attended.output[here], attended.log_sum_exp[here], grad_output[here]
            if has_mask:
                output, log_sum_exp, grad = (_folded(x, key) for x in (output, log_sum_exp[..., None], grad))
                part = Attended(output, log_sum_exp[..., 0], draws)
                given = _folded(query[here], key), key[there], value[there]
                found = self.block.backward(grad, *given, part, self._block(rows, queries, keys, query, key, spec))
            else:
                part = Attended(output, log_sum_exp, draws)
                found = self.plain.backward(grad, query[here], key[there], value[there], part, spec, Documents())
            of_query[here] = _unfolded(found[0], query[here])
            of_key[there] += found[1]
            of_value[there] += found[2]
            del found
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype)

    def _block(
        self, rows: slice, queries: slice, keys: slice, query: Tensor, key: Tensor, spec: AttentionSpec
    ) -> Block:
        """With the mask of one row, (n / k * queries, keys)."""
        (picks,) = self.picks[rows, queries].long()
        count, groups = keys.stop - keys.start, query.shape[1] // key.shape[1]
        own = torch.arange(queries.start, queries.stop, device=picks.device)[:, None]
        # Behind the last key there is a place for what is none, and as many more as kernels want between rows.
        places = torch.where((picks >= keys.start) & (picks <= own), picks - keys.start, count)
        mask = query.new_full((len(picks), ceil_divide(count + 1, MASK_STEP) * MASK_STEP), float("-inf"))
        mask.scatter_(1, places, 0.0)
        mask = mask if groups == 1 else mask.repeat(groups, 1)
        return Block(spec.scaling, spec.dropout, mask=mask[:, :count])


def _pieces(key: Tensor, documents: Documents, picked: int) -> Iterator[tuple[slice, slice, slice, bool]]:
    """Rows, queries, the keys from their document's first to the last query's own, and whether these are picked."""
    batch, length = key.shape[0], key.shape[2]
    for rows, queries, _ in documents.parts(batch, length, length):
        first, stop = queries.start, min(queries.start + picked, queries.stop)
        yield rows, slice(first, stop), slice(first, stop), False
        size = masked_queries(queries.stop - first, on_cpu=is_on_cpu(key))
        while stop < queries.stop:
            block = slice(stop, min(stop + size, queries.stop))
            # Rows of a document have picks of their own, and kernels one mask.
            for row in range(*rows.indices(batch)):
                yield slice(row, row + 1), block, slice(first, block.stop), True
            stop = block.stop


def _folded(of_queries: Tensor, key: Tensor) -> Tensor:
    """(b, n, q, D) -> (b, k, n / k * q, D): no kernel on CUDA groups heads itself where it has a mask."""
    return of_queries.unflatten(1, (key.shape[1], -1)).flatten(2, 3)


def _unfolded(folded: Tensor, of_queries: Tensor) -> Tensor:
    """The way back to the heads and tokens of `of_queries`."""
    return folded.unflatten(2, (-1, of_queries.shape[2])).flatten(1, 2)

"""Attention of one chunk of a sequence to the keys before it, which come in blocks, so that they are never whole.

A block has no mask, so that the query heads of a group can be rows of one head: (B, n, c, D) -> (B, k, n / k * c, D).
No kernel then repeats keys and values, or has gradients of repeated ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import cycle

from torch import Tensor

from .choice import choose_block_kernel
from .documents import Continued, Documents
from .kernel import Attended, Draw, Kernel
from .merging import merge_into
from .spec import AttentionSpec
from .widths import common_width, widened

# Takes the gradients of some tokens' keys and values.
AddGradients = Callable[[slice, Tensor, Tensor], None]


@dataclass(frozen=True)
class KeyBlock:
    """Keys (B, k, T, D) and values (B, k, T, Dv) of consecutive tokens.

    Args:
        first: the position of the first of them in the sequence.
    """

    first: int
    key: Tensor
    value: Tensor


@dataclass(frozen=True)
class EarlierKeys:
    """Attention of a chunk to all keys before it that are in the same document.

    Args:
        name: of the setting "attention".
        documents: of the whole sequence.
        tokens: those of the chunk.
        spec: of the layer, without a window.
    """

    name: str
    documents: Documents
    tokens: slice
    spec: AttentionSpec

    def merge(self, own: Attended, query: Tensor, kv_heads: int, blocks: Iterable[KeyBlock]) -> Attended:
        """The chunk's attention to itself merged with that to the blocks.

        Args:
            own: to itself; its output, in fp32 at least, and log-sum-exp are written over.
        """
        draws, width = list(own.draws), common_width(query, own.output)
        rows = [(part, self._folded(query, part, kv_heads, width)) for part in self._parts(query)]
        for block in blocks:
            for part, queries in rows:
                draws.extend(self._merge_block(block, part, queries, own))
            del block  # before the next is asked for
        return replace(own, draws=draws)

    def add_gradients(
        self,
        of_query: Tensor,
        grad_output: Tensor,
        query: Tensor,
        kv_heads: int,
        attended: Attended,
        blocks: Iterable[KeyBlock],
        add: AddGradients,
    ) -> None:
        """Add what the blocks give to the gradients.

        Args:
            of_query: in fp32 at least, is added to.
            attended: of all keys, with the draws of the blocks.
            add: gets the gradients of earlier keys and values.
        """
        width = common_width(query, grad_output)
        # Without dropout nobody reads what was drawn, and there may be more blocks than in the forward.
        draws = iter(attended.draws) if self.spec.dropout else cycle(attended.draws)
        # What all blocks' backwards need of the chunk.
        given: list[tuple[Continued, Tensor, Tensor, Attended]] = []
        for part in self._parts(query):
            grad, queries, output = (
                self._folded(x, part, kv_heads, width) for x in (grad_output, query, attended.output)
            )
            log_sum_exp = self._grouped(attended.log_sum_exp, part, kv_heads).flatten(2)
            given.append((part, grad, queries, Attended(output, log_sum_exp, draws)))
        for block in blocks:
            for of_part in given:
                self._add_block_gradients(block, *of_part, of_query, add)
            del block

    def _merge_block(self, block: KeyBlock, part: Continued, queries: Tensor, total: Attended) -> list[Draw]:
        seen = self._seen(block, part)
        if seen.start >= seen.stop:
            return []
        key, value = _of_block(block, part, seen, queries)
        found = self._kernel(queries, key).forward(queries, key, value, self.spec, Documents())
        kv_heads, of_values = key.shape[1], total.output.shape[3]
        output, log_sum_exp = (self._grouped(x, part, kv_heads) for x in (total.output, total.log_sum_exp))
        output_there = found.output[..., :of_values].unflatten(2, output.shape[2:4])
        sums_there = found.log_sum_exp.unflatten(2, output.shape[2:4])
        merge_into(output, log_sum_exp, Attended(output_there, sums_there))
        return list(found.draws)

    def _add_block_gradients(
        self,
        block: KeyBlock,
        part: Continued,
        grad_output: Tensor,
        queries: Tensor,
        attended: Attended,
        of_query: Tensor,
        add: AddGradients,
    ) -> None:
        seen = self._seen(block, part)
        if seen.start >= seen.stop:
            return
        key, value = _of_block(block, part, seen, queries)
        kernel = self._kernel(queries, key)
        there, *grads = kernel.backward(grad_output, queries, key, value, attended, self.spec, Documents())
        into = self._grouped(of_query, part, key.shape[1])
        into.add_(there[..., : of_query.shape[3]].unflatten(2, into.shape[2:4]))
        del there, key, value  # copies, where widths differ
        of_key, of_value = (_in_all_rows(x, part, y) for x, y in zip(grads, (block.key, block.value), strict=True))
        add(seen, of_key, of_value)

    def _kernel(self, queries: Tensor, key: Tensor) -> Kernel:
        return choose_block_kernel(self.name, queries, key.shape[2], self.spec, self.documents)

    def _parts(self, query: Tensor) -> list[Continued]:
        return self.documents.continued(len(query), self.tokens)

    def _seen(self, block: KeyBlock, part: Continued) -> slice:
        """The positions of a block's keys that are seen; it may be past its end."""
        return slice(max(block.first, part.first), min(block.first + block.key.shape[2], self.tokens.start))

    def _grouped(self, of_queries: Tensor, part: Continued, kv_heads: int) -> Tensor:
        """Of a part's rows and queries, (B, n, c, ...) -> (b, k, n / k, queries, ...), a view."""
        return of_queries[part.rows, :, : part.stop - self.tokens.start].unflatten(1, (kv_heads, -1))

    def _folded(self, of_queries: Tensor, part: Continued, kv_heads: int, width: int) -> Tensor:
        """Of a part's rows and queries, (B, n, c, D) -> (b, k, n / k * queries, width)."""
        return widened(self._grouped(of_queries, part, kv_heads).flatten(2, 3), width)


def _of_block(block: KeyBlock, part: Continued, seen: slice, queries: Tensor) -> list[Tensor]:
    """A part's keys and values at the positions `seen`, as wide as its queries."""
    places = slice(seen.start - block.first, seen.stop - block.first)
    return [widened(x[part.rows, :, places], queries.shape[3]) for x in (block.key, block.value)]


def _in_all_rows(grad: Tensor, part: Continued, like: Tensor) -> Tensor:
    """A part's gradient, as wide as `like`, with 0 for what of `like`'s rows is not in the part."""
    grad = grad[..., : like.shape[3]]
    if len(grad) == len(like):
        return grad
    everywhere = grad.new_zeros(len(like), *grad.shape[1:])
    everywhere[part.rows] = grad
    return everywhere


def join_keys(needed: slice, blocks: Iterable[KeyBlock], key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values at the positions `needed`, from blocks, and behind them the given ones."""
    before = needed.stop - needed.start
    keys, values = (x.new_empty(*x.shape[:2], before + x.shape[2], x.shape[3]) for x in (key, value))
    keys[:, :, before:], values[:, :, before:] = key, value
    found = 0
    for block in blocks:
        start, stop = max(block.first, needed.start), min(block.first + block.key.shape[2], needed.stop)
        if start < stop:
            into, seen = (
                slice(start - needed.start, stop - needed.start),
                slice(start - block.first, stop - block.first),
            )
            keys[:, :, into], values[:, :, into] = block.key[:, :, seen], block.value[:, :, seen]
            found += stop - start
        del block  # before the next is asked for
    assert found == before, "the blocks cover all earlier tokens that are seen, once"
    return keys, values

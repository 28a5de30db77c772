"""The keys that an indexer picks for each query, in whole documents of a sequence whose shards lie on several ranks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from mst_ds.attention import Documents
from mst_ds.attention.blockwise import is_on_cpu
from mst_ds.geometry import scored_queries
from mst_ds.recompute import Kept
from mst_ds.token_layout import TokenLayout

from .sequence import MixedSequence

# By these names transformers hands an indexer what it may see, and where the keys of earlier tokens are.
MASK, CACHE = "attention_mask", "past_key_values"
# Keys are computed of so many tokens at a time, as the queries are on the way to them.
_KEY_TOKENS = 4096


@dataclass(frozen=True)
class Indexer:
    """An indexer of transformers (lightning indexer, DeepSeek V3.2, arXiv 2512.02556).

    It runs as in a step of generation: on some of its queries, with the keys of all earlier tokens from a cache. So its
    own arithmetic is used, and no scores of S x S are there.

    Args:
        forward: takes hidden states, (B, L, H), first, other tensors with tokens, a mask and a cache; gives the
            positions of picked keys, (B, L, k).
        top_k: so many it picks where there are as many.
        width: of the queries of all its heads.
    """

    forward: Callable[..., Tensor]
    top_k: int
    width: int

    def __call__(self, sequence: MixedSequence, *args: Any, **kwargs: Any) -> Tensor:
        """What it picks of each document as if that were alone, with one all-gather of keys where shards need them.

        Where scores are equal, such as several of 0, torch's `topk` picks any: another one than of the document alone.

        Returns:
            (B, L, k) int32, positions in the whole sequence. Where a query has no more keys than k, -1: it sees all.

        Raises:
            ValueError: it picks another number of keys than it says.
        """
        given = dict(inspect.signature(self.forward).bind(*args, **kwargs).arguments)
        for name in (MASK, CACHE):
            given.pop(name, None)
        hidden_states: Tensor = next(value for value in given.values() if isinstance(value, Tensor))
        batch, length = hidden_states.shape[:2]
        group = sequence.group
        size, rank = (1, 0) if group is None else (group.size, group.rank)
        shape = batch, length, min(self.top_k, size * length)
        picks = torch.full(shape, -1, dtype=torch.int32, device=hidden_states.device)
        if not sequence.documents.has_longer(self.top_k, size * length):
            return picks
        call = _Call(self.forward, given, batch, length)
        keys = torch.cat(list(call.keys()), dim=1)
        if group is not None:
            keys = TokenLayout(size).join(group.all_gather(keys), dim=1)
        shard = slice(rank * length, (rank + 1) * length)
        for rows, first, block in _blocks(self, sequence.documents, keys, shard):
            here = slice(block.start - rank * length, block.stop - rank * length)
            found = call.picks(rows, here, keys[rows, first : block.stop])
            if found.shape[2] != self.top_k:
                raise ValueError(
                    f"an indexer picks {found.shape[2]} of {block.stop - first} keys; allowed: {self.top_k}, its "
                    "index_topk"
                )
            picks[rows, here] = found.int() + first
        return picks


def _blocks(indexer: Indexer, documents: Documents, keys: Tensor, shard: slice) -> Iterator[tuple[slice, int, slice]]:
    """A row, a document's first token, and those of its queries in a shard whose scores are there at a time; the
    first queries of a document need none."""
    batch, length, head_dim = keys.shape
    for rows, document, _ in documents.parts(batch, length, length):
        first, stop = max(document.start + indexer.top_k, shard.start), min(document.stop, shard.stop)
        heads = indexer.width // head_dim
        count = scored_queries(document.stop - document.start, heads, on_cpu=is_on_cpu(keys))
        # Of several rows at a time torch's product would have a copy of the keys for each query.
        for row in range(*rows.indices(batch)):
            for start in range(first, stop, count):
                yield slice(row, row + 1), document.start, slice(start, min(start + count, stop))


@dataclass(frozen=True)
class _Call:
    """One call of an indexer on a shard, by parts of its arguments."""

    forward: Callable[..., Tensor]
    given: dict[str, Any]
    batch: int
    length: int

    def keys(self) -> Iterator[Tensor]:
        """(B, c, D) of some tokens after others."""
        for start in range(0, self.length, _KEY_TOKENS):
            found = _FoundKeys()
            with suppress(_KeysAreFound):
                self._run(slice(0, self.batch), slice(start, min(start + _KEY_TOKENS, self.length)), None, found)
            assert found.keys is not None
            yield found.keys

    def picks(self, rows: slice, queries: slice, keys: Tensor) -> Tensor:
        """(b, c, k) of the last c of these keys, (b, T, D)."""
        count, seen = queries.stop - queries.start, keys.shape[1]
        places = torch.arange(seen, device=keys.device)
        return self._run(rows, queries, (places <= places[seen - count :, None])[None], _KnownKeys(keys))

    def _run(self, rows: slice, tokens: slice, mask: Tensor | None, cache: Any) -> Tensor:
        def part(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] != self.length:
                return value
            return value[rows if len(value) == self.batch else slice(None), tokens]

        return self.forward(**tree_map(part, self.given), **{MASK: mask, CACHE: cache})


@dataclass
class KeptPicks:
    """What one call of an indexer leaves for when its layer is computed again."""

    picks: Kept | None = None

    def take(self) -> Tensor:
        """The same picks. To be called once."""
        assert self.picks is not None
        return self.picks.take()


class _KeysAreFound(Exception):
    """Ends an indexer that runs for its keys."""


@dataclass
class _FoundKeys:
    """A cache that takes an indexer's keys."""

    keys: Tensor | None = None

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        self.keys = keys
        raise _KeysAreFound


@dataclass(frozen=True)
class _KnownKeys:
    """A cache that has the keys of the tokens that run, too."""

    keys: Tensor

    def update_indexer(self, keys: Tensor, layer: int) -> Tensor:
        return self.keys

"""Numbers that the planner and the operators share: what a rank, a chunk and a block hold. Without torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

# With fewer rows CPU GEMMs sum one product after the other: up to four times the error, and slow.
LEAST_CHUNK_TOKENS = 4

# Elements that elementwise work takes at a time: as many as stay in a CPU's cache, and as keep an accelerator busy for
# longer than kernels take to start.
ELEMENTS_IN_CACHE_OF_CPU = 2**19
ELEMENTS_THAT_KEEP_BUSY = 2**24

# Of so many experts weight gradients are computed at a time where one product does several: before they are put where
# they belong they are beside those of all experts.
EXPERTS_OF_A_GRADIENT = 16

# Attention without a kernel: on a CPU a block has so many scores of a head, which stay in its cache; on an accelerator
# so many of all heads, for which it works longer than its kernels take to start. But not fewer rows than are worth a
# matrix product.
_SCORES_OF_A_HEAD, _SCORES_OF_ALL_HEADS, _ROWS = 2**18, 2**25, 64
# Where an indexer picks the keys of each query: a mask's elements, for which a kernel has enough queries, and an
# indexer's scores, of which there are two copies in fp32.
_ELEMENTS_OF_A_MASK, _SCORES_OF_AN_INDEXER = 2**28, 2**26
# The widest head of the flash kernels, torch's and the package's. On devices with little shared memory there is no
# backward of these widths, nor with dropout of those above (torch's `sdp_utils.cpp`).
_WIDEST_FLASH_HEAD, _TOO_WIDE_FOR_LITTLE_SHARED_MEMORY = 256, range(193, 225)
# Queries of a window's block, at least. Fewer waste less on masked scores; more, less on overlapping keys.
_WINDOW_QUERIES = 1024

# What is kept on the host lies in pieces of so many bytes: long enough that a copy takes longer than its start, and a
# power of two, which torch's allocator of pinned memory does not round. What is left of a tensor has a part of one.
HOST_PIECE = 2**25


def ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def shard_length(seq_len: int, sp_size: int) -> int:
    """L, the tokens of a shard: all are equal, as the sequence is padded to a multiple of `sp_size`."""
    return ceil_divide(seq_len, sp_size)


def chunk_slices(num_tokens: int, chunks: int) -> Iterator[slice]:
    """Yield `chunks` slices that cover `range(num_tokens)` exactly once, their lengths differing by at most one.

    Where chunks would be shorter than 4 tokens there are fewer: the plan is made for the full length, and a shorter
    batch must not fail. Nothing outside the loop depends on the number of chunks.

    Raises:
        ValueError: `chunks` is less than 1.
    """
    if chunks < 1:
        raise ValueError(f"chunks must be at least 1, got {chunks}")
    chunks = min(chunks, max(1, num_tokens // LEAST_CHUNK_TOKENS))
    start = 0
    for index in range(chunks):
        stop = start + num_tokens // chunks + (index < num_tokens % chunks)
        yield slice(start, stop)
        start = stop


def block_queries(keys: int, heads: int, *, window: int | None = None, on_cpu: bool = False) -> int:
    """Queries that attention without a kernel takes at a time, of all keys or in a window; heads: of all sequences."""
    scores = _SCORES_OF_A_HEAD if on_cpu else _SCORES_OF_ALL_HEADS // heads
    # No more than a window's worth of queries, which with their windows see twice as many keys.
    most, seen = (keys, keys) if window is None else (window, min(keys, 2 * window))
    return max(_ROWS, min(scores // seen, most))


def window_queries(window: int) -> int:
    """Queries of a block, which share a range of keys, where a kernel that takes masks works through a window."""
    return min(window, max(_WINDOW_QUERIES, window // 4))


def masked_queries(keys: int, *, on_cpu: bool = False) -> int:
    """Queries of a block that has a mask of its own over all keys."""
    return min(max(_ROWS, (_SCORES_OF_A_HEAD if on_cpu else _ELEMENTS_OF_A_MASK) // keys), keys)


def scored_queries(keys: int, heads: int, *, on_cpu: bool = False) -> int:
    """Queries whose scores of an indexer are there at a time, of all keys; heads: its own."""
    scores = ELEMENTS_IN_CACHE_OF_CPU if on_cpu else _SCORES_OF_AN_INDEXER
    return max(1, scores // (keys * heads))


def has_flash_attention(
    element_bytes: int, head_width: int, capability: tuple[int, int] | None = None, *, has_dropout: bool = False
) -> bool:
    """Whether flash attention has a kernel for a forward and its backward on CUDA.

    Args:
        head_width: of queries, keys and values alike: what is narrower is widened.
        capability: the device's, of CUDA; None: of one with all kernels.
    """
    if element_bytes != 2 or head_width > _WIDEST_FLASH_HEAD:
        return False
    if capability is None:
        return True
    has_little = (8, 6) <= capability <= (8, 9) or capability[0] == 12
    if has_little and has_dropout and head_width >= _TOO_WIDE_FOR_LITTLE_SHARED_MEMORY.stop:
        return False
    return capability >= (8, 0) and not (has_little and head_width in _TOO_WIDE_FOR_LITTLE_SHARED_MEMORY)


def flash_query_gradient(length: int, head_dim: int) -> tuple[int, int]:
    """Rows and columns of the fp32 gradient of one head's queries in the backward of flash attention: their number and
    `head_dim`, rounded up (`mha_bwd` in flash_api.cpp)."""
    multiple = 32 if head_dim <= 128 else 64
    return ceil_divide(length, 128) * 128, ceil_divide(head_dim, multiple) * multiple


def pinned_block(count: int, largest_rounded: int = sys.maxsize) -> int:
    """Bytes of the block that torch's allocator of pinned memory takes for `count` bytes: the next power of two
    (`CachingHostAllocatorImpl::allocate`), or as many, if they are more than it is told to round."""
    return 1 << (count - 1).bit_length() if 0 < count <= largest_rounded else count


def host_pieces(count: int) -> Iterator[int]:
    """The sizes of the pieces, all but the last as long, in which `count` bytes lie on the host."""
    for start in range(0, count, HOST_PIECE):
        yield min(HOST_PIECE, count - start)


def host_bytes(count: int) -> int:
    """Bytes of the pieces in pinned memory of a tensor of `count` bytes: the last one may be rounded up."""
    return count // HOST_PIECE * HOST_PIECE + pinned_block(count % HOST_PIECE)


def host_slabs(count: int) -> int:
    """Bytes of the slabs in pinned memory, each as long as a whole piece, that pieces of `count` bytes fill."""
    return ceil_divide(count, HOST_PIECE) * HOST_PIECE


@dataclass(frozen=True)
class HeadLayout:
    """Contiguous, balanced ranges of heads for `sp_size` ranks; neither head count has to be divisible.

    A rank gets the key/value heads that its query heads read. With fewer key/value heads than ranks, or a range that
    begins inside a group of query heads, the same key/value head goes to several ranks.

    A rank may work through its heads in `head_groups` balanced ranges, one after another; where it has fewer heads,
    there are fewer groups. What is said of a rank is then said of one group of a rank, if one is named.

    Raises:
        ValueError: more ranks than query heads, or query heads that are no multiple of the key/value heads.
    """

    num_heads: int
    num_key_value_heads: int
    sp_size: int
    head_groups: int = 1

    def __post_init__(self) -> None:
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_heads} query heads are no multiple of {self.num_key_value_heads} key/value heads"
            )
        if self.sp_size > self.num_heads:
            raise ValueError(
                f"sp_size {self.sp_size} is above the number of query heads {self.num_heads}: "
                f"a rank would have no head; use sp_size <= {self.num_heads}"
            )

    @property
    def group_size(self) -> int:
        """Query heads that read one key/value head."""
        return self.num_heads // self.num_key_value_heads

    @property
    def groups(self) -> range:
        """The groups of heads; on every rank as many, and none of them is empty."""
        return range(min(self.head_groups, self.num_heads // self.sp_size))

    @property
    def group_counts(self) -> list[int]:
        """The group counts with which no key/value head is exchanged twice, from the fewest on."""
        heads, key_value_heads = self.num_heads, self.num_key_value_heads
        if self.sp_size == 1 or heads % self.sp_size or key_value_heads % self.sp_size:
            return [1]
        of_rank = key_value_heads // self.sp_size
        return [count for count in range(1, of_rank + 1) if of_rank % count == 0]

    @property
    def most_query_heads(self) -> int:
        """Query heads of the rank that has most."""
        return ceil_divide(self.num_heads, self.sp_size)

    @property
    def most_key_value_heads(self) -> int:
        """Key/value heads of the rank that has most; one that two groups read counts in both."""
        ranks = range(self.sp_size if self.has_uneven_groups else 1)  # else all ranks are alike
        return max(sum(len(self.key_value_heads(rank, group)) for group in self.groups) for rank in ranks)

    @property
    def most_query_heads_of_group(self) -> int:
        return ceil_divide(self.most_query_heads, len(self.groups))

    @property
    def most_key_value_heads_of_group(self) -> int:
        """Key/value heads that they read, or the copies of these where the heads have no even grouping."""
        if self.has_uneven_groups:
            return self.most_query_heads_of_group
        return ceil_divide(ceil_divide(self.num_key_value_heads, self.sp_size), len(self.groups))

    @property
    def has_uneven_groups(self) -> bool:
        """Whether on some rank a plain grouping does not say which key/value head a query head reads."""
        heads, key_value_heads, ranks = self.num_heads, self.num_key_value_heads, self.sp_size
        return bool(heads % ranks or (key_value_heads % ranks and ranks % key_value_heads))

    def query_heads(self, sp_rank: int, group: int | None = None) -> range:
        heads = _part(range(self.num_heads), sp_rank, self.sp_size)
        return heads if group is None else _part(heads, group, len(self.groups))

    def key_value_heads(self, sp_rank: int, group: int | None = None) -> range:
        heads = self.query_heads(sp_rank, group)
        return range(heads.start // self.group_size, (heads.stop - 1) // self.group_size + 1)

    def key_value_index(self, sp_rank: int, group: int | None = None) -> list[int] | None:
        """For each local query head its local key/value head; None where a plain grouping (h // n) says the same."""
        heads, key_values = self.query_heads(sp_rank, group), self.key_value_heads(sp_rank, group)
        index = [head // self.group_size - key_values.start for head in heads]
        if len(heads) % len(key_values) == 0:
            local_group = len(heads) // len(key_values)
            if index == [position // local_group for position in range(len(heads))]:
                return None
        return index

    @property
    def shares_key_values(self) -> bool:
        """Whether a key/value head is worked on more than once, on several ranks or in several groups."""
        uses = [len(self.key_value_heads(rank, group)) for rank in range(self.sp_size) for group in self.groups]
        return sum(uses) > self.num_key_value_heads


def _part(heads: range, index: int, count: int) -> range:
    base, extra = divmod(len(heads), count)
    start = heads.start + index * base + min(index, extra)
    return range(start, start + base + (index < extra))

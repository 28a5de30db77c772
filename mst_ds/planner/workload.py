"""What one rank computes in a micro-batch: the numbers that the memory terms are made of."""

from __future__ import annotations

from dataclasses import dataclass

from mst_ds.model_shape import ModelShape
from mst_ds.topology import shard_length
from mst_ds.zero import ZeroConfig


def ceil_divide(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


@dataclass(frozen=True)
class Workload:
    """A model under a ZeRO setting, on one shard of `seq_len` tokens, before chunk counts are chosen."""

    shape: ModelShape
    zero: ZeroConfig
    sp_size: int
    seq_len: int
    recompute: bool
    attention: str

    @property
    def tokens(self) -> int:
        """B * L: chunks are taken over the flattened tokens of the micro-batch's shard."""
        return self.zero.micro_batch_size * shard_length(self.seq_len, self.sp_size)

    @property
    def attention_tokens(self) -> int:
        """B * S, with S padded to a multiple of sp_size: between the all-to-alls a rank sees all tokens."""
        return self.tokens * self.sp_size

    @property
    def query_heads(self) -> int:
        """Query heads of a rank between the all-to-alls."""
        return ceil_divide(self.shape.num_attention_heads, self.sp_size)

    @property
    def query_width(self) -> int:
        """Query heads of a rank between the all-to-alls, times the head dimension."""
        return self.query_heads * self.shape.head_dim

    @property
    def key_value_width(self) -> int:
        return ceil_divide(self.shape.num_key_value_heads, self.sp_size) * self.shape.head_dim

    @property
    def repeats_key_value(self) -> bool:
        """Whether attention works on as many key/value heads as query heads.

        Kernels group them themselves, but not sdpa's for fp32; and where ranks have heads of no even grouping, each
        query head gets a copy of its own.
        """
        heads, key_value_heads = self.shape.num_attention_heads, self.shape.num_key_value_heads
        uneven = heads % self.sp_size or (key_value_heads % self.sp_size and self.sp_size % key_value_heads)
        is_ungrouped = bool(uneven) or (self.attention == "sdpa" and self.zero.dtype == "fp32")
        return is_ungrouped and self.key_value_width != self.query_width

    @property
    def block_scores(self) -> int:
        """Scores of one head that attention without a kernel computes at a time: 2^18, but 64 queries at least."""
        length = self.sp_size * shard_length(self.seq_len, self.sp_size)
        return length * max(64, min(2**18 // length, length))

    def chunk_tokens(self, chunks: int) -> int:
        return ceil_divide(self.tokens, chunks)

    def sharded(self, elements: int, from_stage: int) -> int:
        """The elements that a rank holds of something that ZeRO shards from `from_stage` on."""
        return ceil_divide(elements, self.zero.dp_world_size) if self.zero.stage >= from_stage else elements

"""Memory terms of an indexer, and of attention to the keys that it picks."""

from __future__ import annotations

from mst_ds.geometry import masked_queries, scored_queries
from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]

_FP32_BYTES = _PICK_BYTES = 4
# Products, and what is made of them one after the other: scaled, cut off at 0.
_SCORES = 2
# Picks of a block, and their places in its mask: of 8 bytes each.
_PLACE_BYTES = 16


def picks_of_tokens(work: Workload) -> tuple[tuple[str, int], ...]:
    """The factors of a layer's picks on this shard."""
    return ("tokens", work.tokens), ("picked keys", work.picked_keys), ("bytes", _PICK_BYTES)


def picks_of_layers(work: Workload, layers: int) -> Terms:
    """What layers hold of picks until they are differentiated."""
    return () if work.shape.indexer is None else (_product("picks", ("layers", layers), *picks_of_tokens(work)),)


def picks_handed_on(work: Workload) -> Terms:
    """Layers that are computed again hold what the layer before has handed to them; what is kept is the same tensor."""
    indexer, settings = work.shape.indexer, work.settings
    if indexer is None or not indexer.is_shared or (settings.keep_attention and not settings.offload_activations):
        return ()
    return (_product("picks_handed_on", ("layers", indexer.num_layers), *picks_of_tokens(work)),)


def scores_step(work: Workload) -> Terms:
    """While an indexer scores a block of queries, with its keys of the whole sequence."""
    indexer, length = work.shape.indexer, work.attention_length
    if indexer is None or length <= indexer.top_k:
        return ()
    queries = ("queries of a block", min(scored_queries(length, indexer.num_heads), length))
    scores = (("tensors", _SCORES), queries, ("heads", indexer.num_heads), ("tokens of a sequence", length))
    keys = (("tokens of all shards", work.attention_tokens), ("head_dim of the indexer", indexer.head_dim))
    return (
        _product("indexer_scores", *scores, ("bytes", _FP32_BYTES)),
        _product("indexer_keys", *keys, ("bytes", work.zero.dtype_bytes)),
    )


def masked_step(work: Workload, *, backward: bool) -> Terms:
    """Of attention to picked keys, beside what attention to all needs: the picks of all shards, a block's mask, and in
    the backward a block's gradients of all keys and values, and their sums."""
    indexer, length = work.shape.indexer, work.attention_length
    if indexer is None or length <= indexer.top_k:
        return ()
    queries = ("queries of a block", masked_queries(length))
    terms = [
        _product("mask_of_a_block", queries, ("tokens of a sequence", length), ("bytes", work.zero.dtype_bytes)),
        _product("places_of_a_block", queries, ("picked keys", indexer.top_k), ("bytes", _PLACE_BYTES)),
    ]
    tokens = ("tokens of all shards", work.attention_tokens)
    if work.sp_size > 1:
        # With those of each shard, of which they are put together.
        terms.append(_product("gathered_picks", ("tensors", 1), tokens, ("picked keys", indexer.top_k), ("bytes", 4)))
    if backward:
        heads = work.group_key_value_heads
        of_keys = ("width of keys and values", heads * (work.shape.head_dim + work.shape.value_head_dim))
        terms.append(_product("key_value_gradient_sums", tokens, of_keys, ("bytes", _FP32_BYTES)))
        of_block = ("width of keys and values", 2 * heads * work.kernel_head_dim)
        terms.append(_product("block_gradients", tokens, of_block, ("bytes", work.zero.dtype_bytes)))
    return tuple(terms)


def _product(name: str, *factors: tuple[str, int]) -> MemoryTerm:
    return product_term(name, "device", *factors)

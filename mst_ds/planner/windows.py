"""Memory terms of a sliding window's attention where the kernel has none, unlike flash attention: of its blocks."""

from __future__ import annotations

from mst_ds.geometry import window_queries
from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]


def window_mask(work: Workload) -> Terms:
    """The mask that the blocks of all layers share, for the query heads of a group."""
    if not has_blocks(work):
        return ()
    return (
        product_term(
            "window_mask",
            "device",
            ("query heads of a key", _grouped(work)),
            ("queries of a block", _block(work)),
            ("keys of a block", _window(work) + _block(work)),
            ("bytes", work.zero.dtype_bytes),
        ),
    )


def window_gradients(work: Workload) -> Terms:
    """In the backward of a group the gradients of blocks, of one sequence at a time.

    Each block has gradients of all keys that it sees, and keys are seen by several. Where heads are grouped, queries,
    output and its gradient are copied into blocks.
    """
    shape, queries, block = work.shape, _tokens_in_blocks(work), _block(work)
    keys = queries // block * (_window(work) + block)
    key_value_dim = shape.head_dim + shape.value_head_dim
    terms = [
        _gradient(work, "window_key_value_gradients", keys, work.group_key_value_heads * key_value_dim),
        _gradient(work, "window_query_gradients", queries, work.group_query_heads * shape.head_dim),
    ]
    if _grouped(work) > 1:
        width = work.group_query_heads * (shape.head_dim + 2 * shape.value_head_dim)
        terms.append(_gradient(work, "window_copies", queries, width))
    return tuple(terms)


def _gradient(work: Workload, name: str, tokens: int, width: int) -> MemoryTerm:
    factors = (("tokens in blocks", tokens), ("width of a group's heads", width), ("bytes", work.zero.dtype_bytes))
    return product_term(name, "device", *factors)


def has_blocks(work: Workload) -> bool:
    """Whether there are layers with a window that a sequence is longer than, and no kernel that knows windows."""
    shape = work.shape
    if not shape.sliding_windows or work.attention_length <= _window(work):
        return False
    return not work.has_flash and not shape.has_attention_softcap


def _window(work: Workload) -> int:
    return work.shape.sliding_windows[0]


def _block(work: Workload) -> int:
    return window_queries(_window(work))


def _tokens_in_blocks(work: Workload) -> int:
    """Of a sequence: the first window's are plain attention, and what is left at the end is a block of its own."""
    after_window = work.attention_length - _window(work)
    return after_window - after_window % _block(work)


def _grouped(work: Workload) -> int:
    """Query heads that share a key."""
    return work.group_query_heads // work.group_key_value_heads

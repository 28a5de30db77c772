"""Memory terms of a sliding window's attention where no kernel has one: what its blocks of queries make copies of."""

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


def window_graphs(work: Workload, layers: int) -> Terms:
    """What blocks keep for their backward: what their kernel made, of which the output is put together, and where heads
    are grouped, the copies of their queries.

    Args:
        layers: that have a window, and whose graph is there.
    """
    if not has_blocks(work) or not layers:
        return ()
    sequences = ("layers", layers), ("sequences", work.zero.micro_batch_size)
    outputs = ("tokens", work.attention_length), ("width of all heads", work.query_heads * work.shape.value_head_dim)
    terms = [product_term("window_outputs", "device", *sequences, *outputs, ("bytes", work.zero.dtype_bytes))]
    if _grouped(work) > 1:
        tokens = work.attention_length - _window(work)
        queries = ("tokens in blocks", tokens), ("width of all heads", work.query_heads * work.shape.head_dim)
        terms.append(product_term("window_queries", "device", *sequences, *queries, ("bytes", work.zero.dtype_bytes)))
        # A shorter block at the end has a mask of its own, for each group of heads.
        rest = tokens % _block(work)
        mask = (
            ("groups of heads", work.settings.head_groups),
            ("query heads of a key", _grouped(work)),
            ("queries", rest),
            ("keys", _window(work) + rest),
        )
        terms.append(product_term("window_rest_masks", "device", *sequences, *mask, ("bytes", work.zero.dtype_bytes)))
    return tuple(term for term in terms if term.bytes)


def window_gradients(work: Workload) -> Terms:
    """In the backward of a group the gradients of blocks, of one sequence at a time.

    Each block has gradients of all keys that it sees, and keys are seen by several.
    """
    shape, queries, block = work.shape, _tokens_in_blocks(work), _block(work)
    keys = queries // block * (_window(work) + block)
    key_value_dim = shape.head_dim + shape.value_head_dim
    terms = [
        _gradient(work, "window_key_value_gradients", keys, work.group_key_value_heads * key_value_dim),
        _gradient(work, "window_query_gradients", queries, work.group_query_heads * shape.head_dim),
    ]
    if _grouped(work) > 1:
        terms.append(_gradient(work, "window_output_gradients", queries, work.group_query_heads * shape.value_head_dim))
    return tuple(terms)


def _gradient(work: Workload, name: str, tokens: int, width: int) -> MemoryTerm:
    factors = (("tokens in blocks", tokens), ("width of a group's heads", width), ("bytes", work.zero.dtype_bytes))
    return product_term(name, "device", *factors)


def has_blocks(work: Workload) -> bool:
    """Whether there are layers with a window that a sequence is longer than, and no kernel that knows windows."""
    shape = work.shape
    if not shape.sliding_windows or work.attention_length <= _window(work):
        return False
    return work.settings.attention == "sdpa" and not shape.has_attention_softcap


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

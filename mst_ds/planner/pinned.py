"""What pinned memory of the host takes beyond the bytes that are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from mst_ds.geometry import pinned_block
from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.zero import ZeroConfig

Terms = tuple[MemoryTerm, ...]


def rounding_term(name: str, more: int) -> Terms:
    """The bytes that a term's blocks have more than the term, where there are any. No tensor has them; on a CPU, where
    nothing is pinned, there are none."""
    return (product_term(f"{name}_rounding", "host", ("bytes", more), kind="reserve"),) if more else ()


def pinned(term: MemoryTerm, zero: ZeroConfig, blocks: Iterable[int] | None = None, *, is_pinned: bool = True) -> Terms:
    """A term in memory that DeepSpeed pins, with its rounding; alone where it is told not to pin it.

    Args:
        blocks: the bytes of each block. None: there is one.
    """
    if not is_pinned:
        return (term,)
    sizes = [term.bytes] if blocks is None else blocks
    taken = sum(pinned_block(size, zero.largest_rounded_block) for size in sizes)
    return (term, *rounding_term(term.name, taken - term.bytes))

"""What a model says about its mask where transformers would build one, without building it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

_ANY_LENGTH = 2**31


class _OfAllTokens:
    """What stands for a mask may be cut as a mask is where nothing is cut off (Gemma 4 does so for queries)."""

    def __getitem__(self, parts: tuple[slice, ...]) -> Self:
        if any(part.indices(_ANY_LENGTH) != (0, _ANY_LENGTH, 1) for part in parts):
            raise ValueError("the model leaves out tokens of its mask: mst_ds attends from all of them to all")
        return self


@dataclass(frozen=True)
class SlidingWindow(_OfAllTokens):
    """Stands for a sliding window's mask on its way through a model's layers to their attention function.

    Some models (Qwen 2 MoE, Phi 3.5 MoE) have a window in their mask only and do not name it to their attention.
    """

    size: int


@dataclass(frozen=True)
class AttentionBlocks(_OfAllTokens):
    """The same for blocks of so many tokens (Llama 4), counted from a document's first: none sees another block."""

    size: int


@dataclass(frozen=True)
class CausalMask:
    """The same for a causal mask of which a layer takes a part for its indexer: that part stands for it, too."""

    def __getitem__(self, part: Any) -> CausalMask:
        return self


Mask: TypeAlias = SlidingWindow | AttentionBlocks


def describe_mask(*, mask_function: Callable[..., Any], **kwargs: Any) -> Mask | None:
    """A mask function for transformers' `AttentionMaskInterface`: None for a causal mask.

    Raises:
        ValueError: the mask is neither causal, nor a causal sliding window, nor causal in blocks; borders of packed
            documents may be in it.
    """
    masks = _masks(mask_function)
    if len({type(mask) for mask in masks}) > 1:
        raise ValueError("the model asks for a sliding window within blocks: mst_ds knows the one or the other")
    return min(masks, key=lambda mask: mask.size, default=None)


def _masks(mask_function: Callable[..., Any]) -> list[Mask]:
    # transformers builds mask functions out of the functions named here; the parts are in their closures.
    maker = getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0]
    if maker in ("causal_mask_function", "packed_sequence_mask_function"):
        return []
    if maker not in ("sliding_window_overlay", "chunked_overlay", "and_masks", "remap_positions_for_packed_sequence"):
        raise ValueError(
            f"the model asks for a mask by {maker}: mst_ds knows causal attention, sliding windows and blocks only"
        )
    made_of = inspect.getclosurevars(mask_function).nonlocals
    if maker == "sliding_window_overlay":
        return [SlidingWindow(made_of["sliding_window"])]
    if maker == "chunked_overlay":
        return [AttentionBlocks(made_of["chunk_size"])]
    parts = made_of["mask_functions"] if maker == "and_masks" else [made_of["mask_function"]]
    return [mask for part in parts for mask in _masks(part)]

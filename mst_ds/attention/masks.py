"""What a model says about its mask where transformers would build one, without building it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SlidingWindow:
    """Stands for a sliding window's mask on its way through a model's layers to their attention function.

    Some models (Qwen 2 MoE, Phi 3.5 MoE) have a window in their mask only and do not name it to their attention.
    """

    size: int


def describe_mask(*, mask_function: Callable[..., Any], **kwargs: Any) -> SlidingWindow | None:
    """A mask function for transformers' `AttentionMaskInterface`: None for a causal mask.

    Raises:
        ValueError: the mask is neither causal nor a causal sliding window; borders of packed documents may be in it.
    """
    size = _window(mask_function)
    return None if size is None else SlidingWindow(size)


def _window(mask_function: Callable[..., Any]) -> int | None:
    # transformers builds mask functions out of the functions named here; the parts are in their closures.
    maker = getattr(mask_function, "__qualname__", repr(mask_function)).split(".")[0]
    if maker in ("causal_mask_function", "packed_sequence_mask_function"):
        return None
    if maker not in ("sliding_window_overlay", "and_masks", "remap_positions_for_packed_sequence"):
        raise ValueError(
            f"the model asks for a mask by {maker}: mst_ds knows causal attention and sliding windows only"
        )
    made_of = inspect.getclosurevars(mask_function).nonlocals
    if maker == "sliding_window_overlay":
        return made_of["sliding_window"]
    parts = made_of["mask_functions"] if maker == "and_masks" else [made_of["mask_function"]]
    return min((size for part in parts if (size := _window(part)) is not None), default=None)

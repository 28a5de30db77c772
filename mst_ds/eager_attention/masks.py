"""What stands for a causal mask between a decoder, which asks transformers for it, and attention that it writes out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from mst_ds.attention import Mask, describe_mask
from mst_ds.sequence_parallel import ulysses_attention

EAGER_ATTENTION_NAME = "mst_eager"


@dataclass(frozen=True)
class EagerMask:
    """A mask that nobody has built, on its way through a decoder's layers.

    Args:
        mask: what it hides beside what is to come; None for nothing.
        is_boolean: true where it hides, as transformers' mask for eager attention is made boolean; else to be added.
    """

    mask: Mask | None
    is_boolean: bool = False
    # What has no dimensions is not looked into, nor added to, by the decoder.
    ndim: int = 0

    def to(self, *args: Any, **kwargs: Any) -> EagerMask:
        """Of another dtype, as MPT wants it; devices are all the same to it."""
        return replace(self, is_boolean=self.is_boolean or torch.bool in (*args, *kwargs.values()))


def register_eager_attention() -> None:
    """Make `EAGER_ATTENTION_NAME` known to transformers, with masks that are never built. Repeatable."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(EAGER_ATTENTION_NAME, ulysses_attention)
    AttentionMaskInterface.register(EAGER_ATTENTION_NAME, _describe)


def _describe(**kwargs: Any) -> EagerMask:
    return EagerMask(describe_mask(**kwargs))

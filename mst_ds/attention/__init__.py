"""Causal attention on one device: what a layer asks for, the kernels that compute it, documents and windows."""

from .attend import CausalAttention, prepare_attention
from .chunk import KeyBlock
from .documents import Documents, DocumentStarts
from .kernel import Attended
from .masks import AttentionBlocks, CausalMask, Mask, SlidingWindow, describe_mask
from .spec import AttentionSpec

__all__ = [
    "Attended",
    "AttentionBlocks",
    "AttentionSpec",
    "CausalAttention",
    "CausalMask",
    "DocumentStarts",
    "Documents",
    "KeyBlock",
    "Mask",
    "SlidingWindow",
    "describe_mask",
    "prepare_attention",
]

"""Causal attention on one device: what a layer asks for, the kernels that compute it, documents and windows."""

from .documents import DocumentAttention, DocumentStarts
from .kernels import CausalAttention, causal_backend
from .masks import SlidingWindow, describe_mask
from .spec import AttentionSpec

__all__ = [
    "AttentionSpec",
    "CausalAttention",
    "DocumentAttention",
    "DocumentStarts",
    "SlidingWindow",
    "causal_backend",
    "describe_mask",
]

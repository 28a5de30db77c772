"""Attention that a model writes out, as products, a mask and a softmax: taken for what it is, computed as any other."""

from mst_ds.eager_attention.lazy import NotUnderstood
from mst_ds.eager_attention.masks import EAGER_ATTENTION_NAME, register_eager_attention
from mst_ds.eager_attention.run import EagerAttention

__all__ = ["EAGER_ATTENTION_NAME", "EagerAttention", "NotUnderstood", "register_eager_attention"]

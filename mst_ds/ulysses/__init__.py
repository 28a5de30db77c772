"""Ulysses sequence parallelism (arXiv 2309.14509): sequence shards outside attention, head shards inside it."""

from .attention import ATTENTION_NAME, UlyssesContext, register_attention
from .groups import new_sequence_group

__all__ = ["ATTENTION_NAME", "UlyssesContext", "new_sequence_group", "register_attention"]

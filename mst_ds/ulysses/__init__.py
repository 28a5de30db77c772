"""Ulysses sequence parallelism (arXiv 2309.14509): sequence shards outside attention, head shards inside it."""

from .attention import ATTENTION_NAME, UlyssesContext, find_document_starts, register_attention, ulysses_attention
from .groups import ProcessSequenceGroup, SequenceGroup, new_sequence_group
from .simulated import run_simulated

__all__ = [
    "ATTENTION_NAME",
    "ProcessSequenceGroup",
    "SequenceGroup",
    "UlyssesContext",
    "find_document_starts",
    "new_sequence_group",
    "register_attention",
    "run_simulated",
    "ulysses_attention",
]

"""Ulysses sequence parallelism (arXiv 2309.14509): sequence shards outside attention, head shards inside it."""

from .attention_function import ATTENTION_NAME, STREAM_OF_MODULE, UlyssesContext, register_attention, ulysses_attention
from .document_lengths import document_lengths, lengths_of_tokens, positions_in_documents
from .document_starts import find_document_starts
from .groups import ProcessSequenceGroup, SequenceGroup, new_sequence_group
from .simulated import run_simulated

__all__ = [
    "ATTENTION_NAME",
    "STREAM_OF_MODULE",
    "ProcessSequenceGroup",
    "SequenceGroup",
    "UlyssesContext",
    "document_lengths",
    "find_document_starts",
    "lengths_of_tokens",
    "new_sequence_group",
    "positions_in_documents",
    "register_attention",
    "run_simulated",
    "ulysses_attention",
]

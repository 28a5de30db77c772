"""The linear recurrence of RG-LRU, a number for each channel (Griffin, arXiv 2402.19427, section 2.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .scan import Scan
from .sequence import MixedSequence

_SCAN = Scan(
    arguments=(),
    by_head=("hidden_states", "recurrent_gate"),
    initial="recurrent_states",
    gives_state=True,
)


def gated_recurrence(
    sequence: MixedSequence,
    original: Callable[..., Any],
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    **others: Any,
) -> Any:
    """What transformers' `_rnn_scan` gives for each document of the sequence alone, channels divided among the ranks.

    Args:
        hidden_states, recurrent_gate: (B, L, C).
        reset: where positions are 0. There documents begin, before which there is nothing to forget.

    Returns:
        (B, L, C) of this shard, and None for the last state.
    """
    given = {"hidden_states": hidden_states, "recurrent_gate": recurrent_gate, "reset": reset.new_zeros(())}
    return _SCAN(sequence, original, **given, **others)

"""A causal convolution over each channel's tokens, which ends with a document and goes on from shard to shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .exchange import tokens_before
from .sequence import MixedSequence

_ARGUMENTS = ("hidden_states", "weight", "bias", "activation")


def convolution(sequence: MixedSequence, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """What transformers' `causal_conv1d_fn` gives for each document of the sequence alone, with one call of it.

    Before each document stand as many zeros as the convolution looks back; before one that goes on from the shard
    before, its last tokens there.

    Args:
        original: takes hidden_states, (B, C, L), and weight, (C, taps).

    Returns:
        (B, C, L) of this shard.
    """
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    hidden_states, weight = given["hidden_states"], given["weight"]
    back = weight.shape[-1] - 1
    if back == 0 or (sequence.group is None and sequence.documents.are_rows):
        return original(*args, **kwargs)

    def run(tokens: Tensor) -> Tensor:
        if "hidden_states" in kwargs:
            return original(*args, **(kwargs | {"hidden_states": tokens}))
        return original(tokens, *args[1:], **kwargs)

    before = _before(sequence, hidden_states, back)
    if sequence.documents.are_rows:
        return run(torch.cat([before, hidden_states], dim=2))[:, :, back:]
    return _by_document(run, hidden_states, before, _lengths(sequence, *hidden_states.shape[::2]))


def _before(sequence: MixedSequence, hidden_states: Tensor, back: int) -> Tensor:
    """(B, C, back): of the documents that go on into this shard their last tokens, zeros elsewhere."""
    batch, channels, length = hidden_states.shape
    group = sequence.group
    if group is None:
        return hidden_states.new_zeros(batch, channels, back)
    tokens = slice(group.rank * length, (group.rank + 1) * length)
    is_seen = torch.zeros(batch, 1, back, dtype=torch.bool)
    for continued in sequence.documents.continued(batch, tokens):
        seen = min(back, tokens.start - continued.first)
        is_seen[continued.rows, :, back - seen :] = True
    # Also where nothing is seen: all ranks take part in the exchange, and in that of gradients.
    before = tokens_before(hidden_states, back, group)
    return before.masked_fill(~is_seen.to(before.device), 0)


def _lengths(sequence: MixedSequence, batch: int, length: int) -> list[list[int]]:
    """For each row the lengths of its documents in this shard."""
    rank = 0 if sequence.group is None else sequence.group.rank
    of_shard = sequence.documents.within(slice(rank * length, (rank + 1) * length))
    return [lengths for count, lengths in MixedSequence(None, of_shard).rows(batch, length) for _ in range(count)]


def _by_document(
    run: Callable[[Tensor], Tensor], hidden_states: Tensor, before: Tensor, lengths: Sequence[Sequence[int]]
) -> Tensor:
    """All documents of all rows, one after another in one row, each after what it sees before it."""
    back = before.shape[2]
    nothing = torch.zeros_like(before[:1])
    parts: list[Tensor] = []
    for row, (of_row, of_documents) in enumerate(zip(hidden_states.split(1), lengths, strict=True)):
        for index, document in enumerate(of_row.split(list(of_documents), dim=2)):
            parts += [before[row : row + 1] if index == 0 else nothing, document]
    output = run(torch.cat(parts, dim=2))
    sizes = [size for of_documents in lengths for length in of_documents for size in (back, length)]
    of_documents = iter(output.split(sizes, dim=2)[1::2])
    return torch.cat([torch.cat([next(of_documents) for _ in of_row], dim=2) for of_row in lengths])

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
    is_whole = sequence.group is None and sequence.call is None and sequence.documents.are_rows
    if back == 0 or is_whole:
        return original(*args, **kwargs)

    def run(tokens: Tensor) -> Tensor:
        if "hidden_states" in kwargs:
            return original(*args, **(kwargs | {"hidden_states": tokens}))
        return original(tokens, *args[1:], **kwargs)

    carried = sequence.carried()
    earlier = None if carried is None or sequence.call is None else carried.enter(sequence.call, hidden_states)
    before, last = tokens_before(hidden_states, earlier, back, sequence.group)
    before = before.masked_fill(~_is_seen(sequence, hidden_states, back), 0)
    if sequence.documents.are_rows:
        output = run(torch.cat([before, hidden_states], dim=2))[:, :, back:]
    else:
        output = _by_document(run, hidden_states, before, _lengths(sequence, *hidden_states.shape[::2]))
    return output if carried is None or sequence.call is None else carried.leave(sequence.call, output, last)


def _is_seen(sequence: MixedSequence, hidden_states: Tensor, back: int) -> Tensor:
    """(B, 1, back): of the tokens before this rank's, those of the document that goes on into them."""
    batch, _, length = hidden_states.shape
    tokens = sequence.piece(length)
    is_seen = torch.zeros(batch, 1, back, dtype=torch.bool)
    for continued in sequence.documents.continued(batch, tokens):
        seen = min(back, tokens.start - continued.first)
        is_seen[continued.rows, :, back - seen :] = True
    return is_seen.to(hidden_states.device)


def _lengths(sequence: MixedSequence, batch: int, length: int) -> list[list[int]]:
    """For each row the lengths of its documents in what this rank holds."""
    rows = sequence.rows(batch, sequence.piece(length))
    return [lengths for count, lengths in rows for _ in range(count)]


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

"""What modules inside a layer record for the model's output, such as a router's logits, where it runs by chunks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# By the name of the output, such as "router_logits", what each module that records some has given.
Records = dict[str, list[Tensor]]


@contextmanager
def recording() -> Iterator[Records]:
    """What modules record within, for transformers' `capture_outputs`, goes nowhere else. Empty where nobody asks."""
    from transformers.utils.output_capturing import _active_collector

    asked = _active_collector.get()
    if asked is None:
        yield {}
        return
    with recording_of(asked) as records:
        yield records


@contextmanager
def recording_of(names: Iterable[str]) -> Iterator[Records]:
    """The same when a chunk is computed again, where nobody asks but the backward."""
    from transformers.utils.output_capturing import _active_collector

    records: Records = {name: [] for name in names}
    token = _active_collector.set(records)
    try:
        yield records
    finally:
        _active_collector.reset(token)


def hand_on(records: Records) -> None:
    """Record these, in place of the modules."""
    from transformers.utils.output_capturing import _active_collector

    asked: Any = _active_collector.get()
    for name, tensors in records.items():
        asked[name].extend(tensors)


def joined(parts: Sequence[Tensor], batch: int) -> Tensor:
    """Of all tokens, from those of each chunk: (B * c, ...), as routers have them, or (B, c, ...)."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].shape[0] == batch and parts[0].dim() > 2:
        return torch.cat(list(parts), dim=1)
    return torch.cat([part.unflatten(0, (batch, -1)) for part in parts], dim=1).flatten(0, 1)


def cut(whole: Tensor, like: Tensor, tokens: slice, batch: int) -> Tensor:
    """A chunk of what `joined` gave, in the form of `like`, which the chunk has recorded."""
    if whole.shape == like.shape:
        return whole
    if like.shape[0] == batch and like.dim() > 2:
        return whole[:, tokens]
    return whole.unflatten(0, (batch, -1))[:, tokens].flatten(0, 1)

"""Ulysses attention as an attention function of transformers, found by models through `AttentionInterface`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .all_to_all import heads_to_sequence, sequence_to_heads
from .backends import attend_within_documents, causal_backend
from .layout import HeadLayout

ATTENTION_NAME = "mst_ulysses"

# Keyword arguments with which models ask their attention function for something that is not plain causal attention.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class UlyssesContext:
    """What attention needs to know of a forward pass beyond its tensors; travels to every layer as a keyword argument.

    Args:
        group: the sequence group.
        backend: a name that `causal_backend` knows.
        document_starts: see `attend_within_documents`; found once per forward, not once per layer.
    """

    group: dist.ProcessGroup
    backend: str
    document_starts: list[list[int]] | None


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers, with a mask function that never builds a mask. Repeatable."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, ulysses_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ulysses: UlyssesContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention over a sequence whose shards lie on the ranks of a group (arXiv 2309.14509).

    Args:
        query: (B, N, L, D) of this rank's shard, rotary embedding applied; key, value: (B, K, L, D).
        attention_mask: must be None; documents are told apart by `ulysses.document_starts`.

    Returns:
        (B, L, N, D) and None, as transformers' attention functions do.

    Raises:
        ValueError: the model asks for something that this attention does not do, so its result would be wrong.
    """
    if ulysses is None:
        raise ValueError(
            f"{type(module).__name__} does not hand keyword arguments on to its attention function: "
            "sequence parallelism needs that; use sp_size 1 for this model"
        )
    if attention_mask is not None:
        raise ValueError("Ulysses attention takes no attention_mask: pad on the right with ignored labels instead")
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__} asks for {name}={kwargs[name]!r}, which Ulysses attention does not "
                "support: use sp_size 1 for this model"
            )
    if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
        raise ValueError(
            f"{type(module).__name__} is not causal, which Ulysses attention does not support: use sp_size 1"
        )
    group = ulysses.group
    layout = HeadLayout(query.shape[1], key.shape[1], dist.get_world_size(group))
    query, key, value = sequence_to_heads(query, key, value, layout, group)
    index = layout.key_value_index(dist.get_rank(group))
    if index is not None:
        key, value = key[:, index], value[:, index]
    backend = causal_backend(ulysses.backend)
    output = attend_within_documents(backend, query, key, value, scaling, dropout, ulysses.document_starts)
    return heads_to_sequence(output, layout, group), None


def find_document_starts(position_ids: Tensor, group: dist.ProcessGroup) -> list[list[int]] | None:
    """Gather the positions of all shards and find where documents begin: wherever a position does not go on by one.

    Args:
        position_ids: (B, L) of this rank's shard.

    Returns:
        For each row the first index of each document in the whole sequence, or None when every row is one document.
    """
    sp_size = dist.get_world_size(group)
    shards = [torch.empty_like(position_ids, memory_format=torch.contiguous_format) for _ in range(sp_size)]
    dist.all_gather(shards, position_ids.contiguous(), group=group)
    positions = torch.cat(shards, dim=1)
    is_start = torch.ones_like(positions, dtype=torch.bool)
    is_start[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    starts = [row.nonzero().flatten().tolist() for row in is_start]
    return None if all(row == [0] for row in starts) else starts

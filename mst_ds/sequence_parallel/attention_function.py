"""Ulysses attention as an attention function of transformers, found by models through `AttentionInterface`."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from mst_ds.attention import (
    AttentionBlocks,
    AttentionSpec,
    CausalAttention,
    CausalMask,
    Documents,
    DocumentStarts,
    Mask,
    SlidingWindow,
    describe_mask,
)
from mst_ds.geometry import HeadLayout
from mst_ds.layer_stream import LayerStream

from .groups import SequenceGroup
from .head_exchange import HeadExchange
from .sequence_attention import SequenceAttention

ATTENTION_NAME = "mst_ulysses"

# Of a module of a patched model: the stream of its layers, which knows the context where a layer does not hand it on.
STREAM_OF_MODULE = "_mst_stream"

# Tensors that models hand to every attention function, and that change nothing in what is computed here.
_HARMLESS = frozenset({"position_ids", "cache_position"})


@dataclass(frozen=True)
class UlyssesContext:
    """What attention needs to know of a forward pass beyond its tensors; travels to every layer as a keyword argument,
    or else with the stream of the layers.

    Args:
        group: the sequence group; None where the sequence is not sharded.
        backend: a name that `prepare_attention` knows.
        document_starts: see `Documents`; found once per forward, not once per layer.
        head_groups: in so many groups a rank works through its heads, where the sequence is sharded.
        stream: of the model's layers; None where they are not computed again.
        positions: (B, L) or (1, L), of this shard: one more from each token of a document to the next.
    """

    group: SequenceGroup | None
    backend: str
    document_starts: DocumentStarts | None
    head_groups: int = 1
    stream: LayerStream | None = None
    positions: Tensor | None = field(default=None, repr=False, compare=False)

    _in_blocks: dict[tuple[int, int], CausalAttention] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def attention(self) -> CausalAttention:
        """One for all layers, which share a window's mask and the borders of documents."""
        return CausalAttention(self.backend, Documents(self.document_starts))

    def attention_in_blocks(self, size: int, length: int) -> CausalAttention:
        """One for all layers with blocks of `size` tokens, of sequences of `length`."""
        kind = size, length
        if kind not in self._in_blocks:
            documents = Documents(self.document_starts).in_blocks(size, length)
            self._in_blocks[kind] = CausalAttention(self.backend, documents)
        return self._in_blocks[kind]


def register_attention() -> None:
    """Make `ATTENTION_NAME` known to transformers, with a mask function that never builds a mask. Repeatable."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, ulysses_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, describe_mask)


def ulysses_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Mask | CausalMask | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    ulysses: UlyssesContext | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention over a sequence whose shards lie on the ranks of a group (arXiv 2309.14509).

    Args:
        query: (B, N, L, D) of this rank's shard, rotary embedding applied; key: (B, K, L, D); value: (B, K, L, Dv).
        attention_mask: what `register_attention`'s mask function returned; documents and padding are told apart by
            `ulysses.document_starts`.
        indices: (B, L, k) for each query the positions of the keys that its layer's indexer has picked in the sequence.
        kwargs: `sliding_window`, `softcap` and `s_aux`, the (N,) attention sinks, as in `AttentionSpec`.

    Returns:
        (B, L, N, Dv) and None, as transformers' attention functions do.

    Raises:
        ValueError: the model asks for something that this attention does not do, so its result would be wrong.
    """
    ulysses = _context_of(module) if ulysses is None else ulysses
    _check_picks(module, query, attention_mask, indices, ulysses.stream)
    attention_mask = None if isinstance(attention_mask, CausalMask) else attention_mask
    _check_request(module, query, key, attention_mask, kwargs)
    query, key, value = _one_dtype(module, query, key, value)
    group, call = ulysses.group, None if ulysses.stream is None else ulysses.stream.call
    sp_size, head_groups = (1, 1) if group is None else (group.size, ulysses.head_groups)
    length = query.shape[2] if call is None else call.chunks[-1].stop
    spec = AttentionSpec(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        window=attention_mask.size
        if isinstance(attention_mask, SlidingWindow)
        else kwargs.get("sliding_window") or None,
        softcap=kwargs.get("softcap"),
    ).within(sp_size * length)
    layout = HeadLayout(query.shape[1], key.shape[1], sp_size, head_groups)
    causal = ulysses.attention
    if isinstance(attention_mask, AttentionBlocks) and attention_mask.size < sp_size * length:
        causal = ulysses.attention_in_blocks(attention_mask.size, sp_size * length)
    if query.shape[2] < sp_size * length or not ulysses.attention.documents.are_rows:
        _check_places(module, sp_size * length)
    attention = SequenceAttention(causal, spec, HeadExchange(group, layout), indices)
    return attention(query, key, value, kwargs.get("s_aux"), stream=ulysses.stream), None


def _context_of(module: nn.Module) -> UlyssesContext:
    """The context where a model's layers do not hand keyword arguments on to their attention.

    Raises:
        ValueError: no forward of a patched decoder runs.
    """
    stream: LayerStream | None = module.__dict__.get(STREAM_OF_MODULE)
    holder = stream if stream is None or stream.call is None else stream.call
    context: UlyssesContext | None = getattr(holder, "context", None)
    if context is None:
        raise ValueError(
            f"{type(module).__name__} calls the attention of mst_ds outside the forward of a patched decoder: the "
            "forward of its decoder was replaced after mst_ds.apply_plan"
        )
    return context


def _check_request(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Mask | None, kwargs: dict[str, Any]
) -> None:
    """Refuse what would not be causal self-attention over whole documents."""
    name = type(module).__name__
    if attention_mask is not None and not isinstance(attention_mask, Mask):
        raise ValueError(
            f"{name} hands its attention function an attention_mask of its own, which mst_ds's attention cannot take: "
            "pass position_ids that restart with each document, and a mask of 1 and 0 for padding"
        )
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"{name} is not causal, which mst_ds's attention does not support")
    # A layer that names a window of 0 has none, as in transformers.
    window = kwargs.get("sliding_window") or None
    size = window if attention_mask is None else attention_mask.size
    if size is not None and size < 1:
        kind = "blocks" if isinstance(attention_mask, AttentionBlocks) else "a sliding window"
        raise ValueError(f"{name} has {kind} of {size}; allowed: 1 token or more")
    if window is not None and size != window:
        raise ValueError(f"{name} asks for sliding_window={window}, but its mask has a window of {size}")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{name} attends from {query.shape[2]} tokens to {key.shape[2]}: "
            "mst_ds's attention is over the tokens themselves"
        )
    for argument, tensor in kwargs.items():
        if isinstance(tensor, Tensor) and argument != "s_aux" and argument not in _HARMLESS:
            raise ValueError(
                f"{name} hands {argument} to its attention function, which mst_ds's attention does not know"
            )


def _check_picks(
    module: nn.Module, query: Tensor, attention_mask: Any, indices: Tensor | None, stream: LayerStream | None
) -> None:
    """Refuse picks that are not those of whole shards, one row for each query."""
    name = type(module).__name__
    if indices is None:
        if isinstance(attention_mask, CausalMask):
            raise ValueError(f"{name} has an indexer and hands no indices to its attention function")
        return
    batch, _, length, _ = query.shape
    if indices.dim() != 3 or indices.shape[:2] != (batch, length) or indices.is_floating_point():
        raise ValueError(
            f"{name} hands indices {tuple(indices.shape)} in {indices.dtype} to its attention function; allowed: whole "
            f"numbers ({batch}, {length}, picked keys)"
        )
    if stream is not None and stream.call is not None and len(stream.call.chunks) > 1:
        raise ValueError(f'{name} picks its keys of whole shards: set "layer_chunks": 1 in the "mst" block')


def _check_places(module: nn.Module, length: int) -> None:
    """Llama 4 scales queries by their places among the tokens that a layer is given, not by their positions: they
    differ on a shard, in a chunk and in a document, and the scale does from `floor_scale` tokens on."""
    floor = getattr(module, "floor_scale", None)
    is_scaled = getattr(module, "attn_temperature_tuning", False) and not getattr(module, "use_rope", False)
    if floor is not None and is_scaled and length >= floor:
        raise ValueError(
            f"{type(module).__name__} scales its queries by their places in what it is given, which are not their "
            f"positions on a shard, in a chunk or in a packed row of {length} tokens; allowed: fewer than {floor}, "
            'or one document a row with sp_size 1 and "layer_chunks": 1 in the "mst" block'
        )


def _one_dtype(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast its dtype: a rotary embedding or norm may have left fp32 behind."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device) and all(tensor.dtype != torch.float64 for tensor in tensors):
        tensors = tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    dtypes = [tensor.dtype for tensor in tensors]
    if len(set(dtypes)) > 1:
        raise ValueError(
            f"{type(module).__name__} has query, key, value in {', '.join(map(str, dtypes))}: they must have one dtype"
        )
    return tensors

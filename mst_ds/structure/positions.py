"""Finds what a model makes of positions beyond rotary embeddings: a table of them, and where they must begin."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from mst_ds.structure.mixers import MethodStructure, Mixer, names_of, plain_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def position_table(model: PreTrainedModel) -> int | None:
    """The positions that a model has an embedding, an angle or a mask for; None where any length will do.

    A model on the meta device will do. `mst_ds.model_shape` knows some by name, which compute their table as they run.
    """
    config: Any = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None or getattr(config, "rope_parameters", None):
        return None
    embeddings = (
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module is not model.get_input_embeddings()
    )
    # OPT's table has two rows before the first position.
    tables = {embedding.num_embeddings - getattr(embedding, "offset", 0) for embedding in embeddings}
    tables |= {buffer.shape[-2] for buffer in model.buffers() if buffer.dim() >= 2}
    return positions if positions in tables else None


def begins_with_each_document(model: PreTrainedModel, mixers: Iterable[Mixer]) -> bool:
    """Whether positions that nobody gives have to be 0 at a document's first token, whatever padding stands before it:
    the model counts tokens by its mask (OPT), or forgets a state where they are 0 (RG-LRU)."""
    forgets = any(isinstance(mixer, MethodStructure) for mixer in mixers)
    return forgets or any(_counts_by_mask(plain_forward(module)) for module in model.modules())


def _counts_by_mask(forward: Any) -> bool:
    """Whether a decoder's forward sums up its mask, where it may be given positions instead."""
    if not isinstance(forward, types.FunctionType) or "cumsum" not in names_of(forward.__code__):
        return False
    return {"input_ids", "attention_mask", "position_ids"} <= set(inspect.signature(forward).parameters)

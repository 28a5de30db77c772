"""Finds the table from which a model without rotary embeddings takes its positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

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

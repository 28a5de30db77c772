"""Where the tokens of a model meet: whether it can be exact on a shard, and on packed documents."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING

from torch import nn

from mst_ds.model_shape import other_layers
from mst_ds.structure.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_shardable(model: PreTrainedModel) -> None:
    """Refuse what is not exact on a shard: tokens may meet in causal attention over all positions, nowhere else.

    Raises:
        ValueError: a model without transformers' attention interface, attention that is not causal, or layers that mix
            tokens in another way, such as linear attention, state spaces and convolutions.
    """
    name, advice = type(model).__name__, "use sp_size 1 for this model"
    if not _uses_interface(model):
        raise ValueError(
            f"{name} does not use transformers' attention interface, which sequence parallelism needs: {advice}"
        )
    config = model.config.get_text_config()
    is_causal = getattr(config, "is_causal", True) and not getattr(config, "use_bidirectional_attention", False)
    reason = _other_mixing(model) if is_causal else "attention that is not causal"
    if reason is not None:
        raise ValueError(f"{name} has {reason}, which sequence parallelism does not support: {advice}")


def why_own_attention(model: PreTrainedModel) -> str | None:
    """Why a model keeps its own attention, and takes one document a row, in words that follow its name.

    None where this project's attention keeps documents apart and hides padding, because tokens meet nowhere else.
    """
    if not _uses_interface(model):
        return "does not use transformers' attention interface, which packed documents need"
    reason = _other_mixing(model)
    return None if reason is None else f"has {reason}, which run on from one packed document into the next"


def _uses_interface(model: PreTrainedModel) -> bool:
    """Whether attention is called through transformers' interface: the model says so, or each of its layers does it."""
    layers = decoder_layers(model)
    return model._supports_attention_backend or (bool(layers) and all(map(_calls_interface, layers)))


def _calls_interface(layer: nn.Module) -> bool:
    forwards = (inspect.unwrap(type(module).forward) for module in layer.modules())
    return any(
        "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names
        for forward in forwards
        if isinstance(forward, types.FunctionType)
    )


def _other_mixing(model: PreTrainedModel) -> str | None:
    """What besides attention lets tokens meet; None where there is nothing."""
    if others := other_layers(model.config.get_text_config()):
        return f"layers of type {', '.join(others)}"
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        return "convolutions over the sequence"
    return None

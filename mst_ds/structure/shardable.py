"""Which models can be exact on a shard of the sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION_TYPES = frozenset({"full_attention", "attention", "sliding_attention"})


def require_shardable(model: PreTrainedModel) -> None:
    """Refuse what is not exact on a shard: tokens may meet in causal attention over all positions, nowhere else.

    Raises:
        ValueError: a model without transformers' attention interface, attention that is not causal, or layers that mix
            tokens in another way, such as linear attention, state spaces and convolutions.
    """
    name, advice = type(model).__name__, "use sp_size 1 for this model"
    if not model._supports_attention_backend:
        raise ValueError(
            f"{name} does not use transformers' attention interface, which sequence parallelism needs: {advice}"
        )
    config = model.config.get_text_config()
    types = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    others = ", ".join(sorted(types - _ATTENTION_TYPES))
    reasons = {
        f"layers of type {others}": bool(others),
        "convolutions over the sequence": any(isinstance(module, nn.Conv1d) for module in model.modules()),
        "attention that is not causal": getattr(config, "is_causal", True) is False
        or bool(getattr(config, "use_bidirectional_attention", False)),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{name} has {reason}, which sequence parallelism does not support: {advice}")

"""A model inside adapters of peft, which a plan patches below them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mst_ds.settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def base_model(model: Any) -> Any:
    """The model itself, or the one that peft has wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def without_adapters(model: Any, settings: Settings) -> PreTrainedModel:
    """`base_model`, where a plan with these settings is exact below its adapters.

    Raises:
        ValueError: it is not.
    """
    base: PreTrainedModel = base_model(model)
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        raise ValueError(
            "an activated LoRA adapts the tokens after its invocation, which chunks and shards do not see: use a LoRA "
            "without alora_invocation_tokens"
        )
    if base is not model:
        _check_tuner(model, settings)
    return base


def _check_tuner(model: Any, settings: Settings) -> None:
    from peft.tuners.tuners_utils import BaseTuner

    if not model.active_peft_config.is_prompt_learning:
        if type(model.base_model).forward is not BaseTuner.forward:
            raise ValueError(
                f"{type(model.base_model).__name__} does more than adapt layers, such as add to the loss: use adapters "
                "that do not, such as LoRA"
            )
    elif settings.sp_size > 1:
        raise ValueError(
            "an adapter that learns a prompt puts it before the sequence, of which a shard is a part: use sp_size 1"
        )

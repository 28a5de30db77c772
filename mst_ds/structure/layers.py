"""The decoder layers of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers itself treats as the unit of recompute; of one inside another the outer one. Where
    it has no such unit (CTRL, GPT), the first list of as many modules as the config has layers."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {module for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if layer not in inside] if layers else _listed_layers(model)


def _listed_layers(model: PreTrainedModel) -> list[nn.Module]:
    config: Any = model.config.get_text_config()
    count = getattr(config, "num_hidden_layers", None)
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return next((list(layers) for layers in lists if len(layers) == count), [])

"""The decoder layers of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers itself treats as the unit of recompute; of one inside another the outer one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inside = {module for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if layer not in inside]

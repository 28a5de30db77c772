"""Small models with adapters of peft, and a batch for them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import ARCHITECTURES, build
from torch import nn
from transformers import PreTrainedModel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
HEAD, EMBEDDINGS = ["lm_head"], ["embed_tokens"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

Adapter = dict[str, Any]


def base_model(architecture: str) -> PreTrainedModel:
    """A model of `tiny_models`, with its router loss if it has one."""
    config_class, model_class, settings = ARCHITECTURES[architecture]
    return build(config_class, model_class, **settings, output_router_logits="num_experts_per_tok" in settings)


def adapted(architecture: str, adapter: Adapter) -> PeftModel:
    """The same model each time. No adapter is without effect, as those newly made are."""
    torch.manual_seed(1)
    model = get_peft_model(base_model(architecture), lora(**adapter))
    randomise(model)
    return model


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **copy.deepcopy(settings)})


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=0.1)

"""Tiny models with tensors that transformers keeps in fp32, and with values that 16 bits do not hold."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedModel,
)

from mst_ds.data.tokenizer import byte_tokenizer

SIZES = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 256,
    "pad_token_id": 0,
    "moe_intermediate_size": 24,
}
EXPERTS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
MODELS = {
    # The router's bias is a buffer.
    "glm4-moe": (Glm4MoeConfig, Glm4MoeForCausalLM, {**EXPERTS, "num_key_value_heads": 2, "head_dim": 8}),
    "deepseek-v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
    # Here it is a parameter that is not trained, and the router's weight one that is.
    "ernie4.5-moe": (
        Ernie4_5_MoeConfig,
        Ernie4_5_MoeForCausalLM,
        {
            "num_key_value_heads": 2,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "tie_word_embeddings": True,
        },
    ),
}
BIAS = "e_score_correction_bias"
ROUTER = "model.layers.1.mlp.gate.weight"


def kept_model(name: str) -> PreTrainedModel:
    """In fp32. Eight experts whose biases are one number in bf16, and the order of their scores all that counts."""
    config_class, model_class, settings = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config_class(**SIZES, **settings)).float()
    with torch.no_grad():
        for each, tensor in (*model.named_parameters(), *model.named_buffers()):
            if each.endswith(BIAS):
                tensor.copy_((8 + torch.arange(8) * 0.02 / 7).view_as(tensor))
            elif tensor.is_floating_point() and "rotary" not in each:
                tensor.add_(torch.randn_like(tensor), alpha=0.05)
    return model


def save_kept_model(name: str, folder: Path) -> Path:
    """In the dtypes of a published one in bf16, with a tokenizer."""
    model = kept_model(name)
    for each, parameter in model.named_parameters():
        if not (each.endswith(BIAS) or (name == "ernie4.5-moe" and each == ROUTER)):
            parameter.data = parameter.data.bfloat16()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder

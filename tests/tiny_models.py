"""Random models of every supported shape of architecture, small enough for a test."""

from __future__ import annotations

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    # Within the vocabulary: the defaults of most are not.
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_DROPOUT = {"residual_dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 2}),
    "llama-bias-tied": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"num_key_value_heads": 2}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {"num_key_value_heads": 2, "sliding_window": 8}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"num_key_value_heads": 1, "head_dim": 8}),
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "phi": (PhiConfig, PhiForCausalLM, {}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM, {"num_key_value_heads": 2, **NO_DROPOUT}),
}


def build(config_class: type, model_class: type, **settings: object) -> PreTrainedModel:
    """A model in fp64 and training mode, the same every time, with biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    model = model_class(config_class(**{**SIZES, **settings})).double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def tiny_model(name: str) -> PreTrainedModel:
    config_class, model_class, settings = ARCHITECTURES[name]
    return build(config_class, model_class, **settings)

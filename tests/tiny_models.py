"""Random models of every supported shape of architecture, small enough for a test."""

from __future__ import annotations

import torch
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
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
GQA = {"num_key_value_heads": 2}
# Experts of their own width; the other implementations of transformers have no fp64.
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 3.0, 4.0],
    "original_max_position_embeddings": 10,
}

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, GQA),
    "llama-bias-tied": (LlamaConfig, LlamaForCausalLM, {"mlp_bias": True, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, GQA),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**GQA, "head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, {**GQA, "sliding_window": 8}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"num_key_value_heads": 1, "head_dim": 8}),
    # Caps so low that they show. Only transformers' eager attention has them.
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        {
            **GQA,
            "head_dim": 8,
            "sliding_window": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",
        },
    ),
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {**GQA, "head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_inner": 48, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi": (PhiConfig, PhiForCausalLM, {}),
    "phi3": (Phi3Config, Phi3ForCausalLM, GQA),
    "phi3-longrope": (Phi3Config, Phi3ForCausalLM, {**GQA, "rope_parameters": LONGROPE}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "starcoder2": (Starcoder2Config, Starcoder2ForCausalLM, {**GQA, **NO_DROPOUT}),
    "cohere": (CohereConfig, CohereForCausalLM, GQA),
    "granite": (
        GraniteConfig,
        GraniteForCausalLM,
        {**GQA, "logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    ),
    "apertus": (ApertusConfig, ApertusForCausalLM, GQA),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {**GQA, **EXPERTS, "num_local_experts": 4}),
    "qwen3-moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {**GQA, **EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24},
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {**GQA, **EXPERTS, "num_experts": 4}),
    "gpt-oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {**GQA, **EXPERTS, "head_dim": 8, "num_local_experts": 4, "sliding_window": 8},
    ),
    # The first layer has a plain MLP, the second experts and a shared one.
    "deepseek-v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            **EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
    # Its attention is written out, and it adds to its MLP's output in place.
    "falcon": (FalconConfig, FalconForCausalLM, {"ffn_hidden_size": 48, "attention_dropout": 0.0}),
    # Its attention is its own.
    "falcon-alibi": (
        FalconConfig,
        FalconForCausalLM,
        {"alibi": True, "ffn_hidden_size": 48, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    ),
}
# Those whose attention is not this project's: one document a row, and no shards.
OWN_ATTENTION = ["falcon-alibi"]
SHARDABLE = [name for name in ARCHITECTURES if name not in OWN_ATTENTION]


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

"""The architectures of docs/models.md: some by name, with shapes of published models, and all others by their type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig


@dataclass(frozen=True)
class Architecture:
    """A model family, and of the config of one of its published models what decides the architecture, not the sizes.

    example: None where the config is transformers' own, as it is without a published model.
    """

    name: str
    example: str | None
    model_type: str
    values: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_name(self) -> bool:
        """Whether it is one of the table."""
        return self.name != self.model_type

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(self.model_type, **self.values)


def rope(theta: float, rope_type: str = "default", **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **values}}


def heads(query: int, key_value: int, head_dim: int | None = None) -> dict[str, int]:
    dims = {} if head_dim is None else {"head_dim": head_dim}
    return {"num_attention_heads": query, "num_key_value_heads": key_value, **dims}


LLAMA_3_ROPE = rope(
    500_000.0, "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
# One factor for each of the 48 frequencies; the published ones rise like these.
PHI_3_LONGROPE = rope(
    10_000.0,
    "longrope",
    short_factor=[1.0 + 0.04 * index for index in range(48)],
    long_factor=[1.0 + 1.3 * index for index in range(48)],
)
GPT_OSS_ROPE = rope(
    150_000.0,
    "yarn",
    factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
    truncate=False,
    original_max_position_embeddings=4096,
)
DEEPSEEK_ROPE = rope(
    10_000.0,
    "yarn",
    factor=40.0,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
    original_max_position_embeddings=4096,
)
ROUTER_LOSS = {"output_router_logits": True}

ARCHITECTURES = (
    Architecture("Llama 3", "meta-llama/Meta-Llama-3-8B", "llama", {**heads(32, 8), **rope(500_000.0)}),
    Architecture(
        "Llama 3.1",
        "meta-llama/Llama-3.1-8B",
        "llama",
        {**heads(32, 8), **LLAMA_3_ROPE, "max_position_embeddings": 131072},
    ),
    Architecture(
        "Llama 3.2",
        "meta-llama/Llama-3.2-1B",
        "llama",
        {
            "hidden_size": 2048,
            **heads(32, 8, 64),
            **LLAMA_3_ROPE,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
    ),
    Architecture("Qwen 2", "Qwen/Qwen2.5-7B", "qwen2", {"hidden_size": 3584, **heads(28, 4), **rope(1_000_000.0)}),
    Architecture("Qwen 3", "Qwen/Qwen3-8B", "qwen3", {**heads(32, 8, 128), **rope(1_000_000.0)}),
    Architecture(
        "Qwen 3 MoE",
        "Qwen/Qwen3-30B-A3B",
        "qwen3_moe",
        {**heads(32, 4, 128), **rope(1_000_000.0), "norm_topk_prob": True, **ROUTER_LOSS},
    ),
    Architecture("Mistral", "mistralai/Mistral-7B-v0.1", "mistral", {**heads(32, 8), "sliding_window": 4096}),
    Architecture(
        "Mixtral",
        "mistralai/Mixtral-8x7B-v0.1",
        "mixtral",
        {**heads(32, 8), **rope(1_000_000.0), "sliding_window": None, "router_aux_loss_coef": 0.02, **ROUTER_LOSS},
    ),
    Architecture(
        "Gemma 2",
        "google/gemma-2-27b",
        "gemma2",
        {"hidden_size": 4608, **heads(32, 16, 128), "query_pre_attn_scalar": 144, "sliding_window": 4096},
    ),
    Architecture(
        "Gemma 3 (text)",
        "google/gemma-3-1b-pt",
        "gemma3_text",
        {"hidden_size": 1152, **heads(4, 1, 256), "sliding_window": 512},
    ),
    Architecture("Phi 3", "microsoft/Phi-3-mini-4k-instruct", "phi3", {"sliding_window": 2047}),
    Architecture(
        "Phi 3 (longrope)",
        "microsoft/Phi-3-mini-128k-instruct",
        "phi3",
        {
            **PHI_3_LONGROPE,
            "sliding_window": 262144,
            "max_position_embeddings": 131072,
            "original_max_position_embeddings": 4096,
        },
    ),
    Architecture("OLMo 2", "allenai/OLMo-2-1124-7B", "olmo2", rope(500_000.0)),
    Architecture(
        "GPT-NeoX",
        "EleutherAI/gpt-neox-20b",
        "gpt_neox",
        {"hidden_size": 6144, "num_attention_heads": 64, "hidden_act": "gelu_fast", "rotary_pct": 0.25},
    ),
    Architecture("GPT-2", "openai-community/gpt2", "gpt2"),
    Architecture(
        "GPT-OSS",
        "openai/gpt-oss-20b",
        "gpt_oss",
        {**GPT_OSS_ROPE, "num_hidden_layers": 24, "num_local_experts": 32, "router_aux_loss_coef": 0.9, **ROUTER_LOSS},
    ),
    Architecture(
        "OLMoE", "allenai/OLMoE-1B-7B-0924", "olmoe", {**heads(16, 16), "intermediate_size": 1024, **ROUTER_LOSS}
    ),
    Architecture("OLMo 3", "allenai/Olmo-3-1025-7B", "olmo3", rope(500_000.0)),
    Architecture(
        "Qwen 2 MoE",
        "Qwen/Qwen1.5-MoE-A2.7B",
        "qwen2_moe",
        {**rope(1_000_000.0), "tie_word_embeddings": False, **ROUTER_LOSS},
    ),
    Architecture(
        "DeepSeek V3",
        "deepseek-ai/DeepSeek-V3",
        "deepseek_v3",
        {**DEEPSEEK_ROPE, "max_position_embeddings": 163840},
    ),
    Architecture(
        "GLM 4.5 (MoE)",
        "zai-org/GLM-4.5-Air",
        "glm4_moe",
        {
            **heads(96, 8, 128),
            **rope(1_000_000.0, partial_rotary_factor=0.5),
            "attention_bias": True,
            "use_qk_norm": False,
        },
    ),
    Architecture("GLM 4", "zai-org/GLM-4-9B-0414", "glm4", rope(10_000.0, partial_rotary_factor=0.5)),
    Architecture(
        "Granite 3",
        "ibm-granite/granite-3.1-8b-base",
        "granite",
        {
            **heads(32, 8),
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.0078125,
            "logits_scaling": 16.0,
            "attention_dropout": 0.1,
            "tie_word_embeddings": True,
        },
    ),
    Architecture("Cohere", "CohereLabs/c4ai-command-r-v01", "cohere", {**heads(64, 64), "logit_scale": 0.0625}),
    Architecture(
        "Cohere 2",
        "CohereLabs/c4ai-command-r7b-12-2024",
        "cohere2",
        {"hidden_size": 4096, **heads(32, 8), "logit_scale": 0.25, "sliding_window": 4096},
    ),
    Architecture("Gemma", "google/gemma-7b", "gemma"),
    Architecture(
        "Phi",
        "microsoft/phi-2",
        "phi",
        {"hidden_size": 2560, **rope(10_000.0, partial_rotary_factor=0.4), "resid_pdrop": 0.1},
    ),
    Architecture(
        "StarCoder 2",
        "bigcode/starcoder2-7b",
        "starcoder2",
        {
            "hidden_size": 4608,
            **heads(36, 4),
            "sliding_window": 4096,
            "attention_dropout": 0.1,
            "residual_dropout": 0.1,
        },
    ),
    Architecture("SmolLM 3", "HuggingFaceTB/SmolLM3-3B", "smollm3", rope(5_000_000.0)),
    Architecture(
        "Nemotron",
        "nvidia/Minitron-8B-Base",
        "nemotron",
        {"hidden_size": 4096, **heads(32, 8, 128), **rope(10_000.0, partial_rotary_factor=0.5)},
    ),
    Architecture("Apertus", "swiss-ai/Apertus-8B-2509", "apertus", heads(32, 8)),
    Architecture(
        "Seed-OSS", "ByteDance-Seed/Seed-OSS-36B-Base", "seed_oss", {"hidden_size": 5120, **heads(80, 8, 128)}
    ),
    Architecture("ERNIE 4.5", "baidu/ERNIE-4.5-0.3B-PT", "ernie4_5"),
    Architecture(
        "EXAONE 4",
        "LGAI-EXAONE/EXAONE-4.0-32B",
        "exaone4",
        {"hidden_size": 5120, **heads(40, 8, 128), "num_hidden_layers": 64, "sliding_window": 4096},
    ),
    Architecture(
        "StableLM 2",
        "stabilityai/stablelm-2-1_6b",
        "stablelm",
        {"hidden_size": 2048, **heads(32, 32), "use_qkv_bias": True, **rope(10_000.0, partial_rotary_factor=0.25)},
    ),
    Architecture("MiniCPM 3", "openbmb/MiniCPM3-4B", "minicpm3"),
    Architecture(
        "Phi 3.5 MoE", "microsoft/Phi-3.5-MoE-instruct", "phimoe", {"attention_bias": True, "lm_head_bias": True}
    ),
    Architecture("Falcon", "tiiuae/falcon-7b", "falcon"),
    Architecture("BLOOM", "bigscience/bloom", "bloom"),
    Architecture("OPT", "facebook/opt-6.7b", "opt", {"dropout": 0.1}),
    Architecture("GPT-J", "EleutherAI/gpt-j-6b", "gptj"),
    Architecture("Mamba", "state-spaces/mamba-2.8b-hf", "mamba"),
    Architecture(
        "LFM 2",
        "LiquidAI/LFM2-1.2B",
        "lfm2",
        {"num_hidden_layers": 16, "full_attn_idxs": [2, 5, 8, 10, 12, 14], **rope(1_000_000.0)},
    ),
    Architecture(
        "Granite 4 (hybrid)",
        "ibm-granite/granite-4.0-h-tiny",
        "granitemoehybrid",
        {
            "hidden_size": 1536,
            **heads(12, 4),
            "num_hidden_layers": 40,
            "layer_types": [("attention" if index % 10 == 5 else "mamba") for index in range(40)],
            "mamba_n_heads": 48,
            "mamba_d_state": 128,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "tie_word_embeddings": True,
        },
    ),
    Architecture("Qwen 3 Next", "Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next", {"num_local_experts": 512}),
    Architecture("Llama 4 (text)", "meta-llama/Llama-4-Scout-17B-16E", "llama4_text"),
)

# Types whose config as transformers makes it is not that of any model, or fits itself nowhere.
PUBLISHED: Mapping[str, tuple[str | None, Mapping[str, Any]]] = {
    # Of no published one: the kind of layers that it has by itself needs a RoPE.
    "cohere_compass_text": (
        None,
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}},
    ),
    "dbrx": (
        "databricks/dbrx-base",
        {
            "d_model": 6144,
            "n_heads": 48,
            "attn_config": {"kv_n_heads": 8, "clip_qkv": 8, "rope_theta": 500_000},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
    ),
    "deepseek_v2": (
        "deepseek-ai/DeepSeek-V2-Lite",
        {
            "hidden_size": 2048,
            **heads(16, 16),
            "q_lora_rank": None,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
        },
    ),
    "dots1": (
        "rednote-hilab/dots.llm1.base",
        {
            **heads(32, 32),
            "n_routed_experts": 128,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
    ),
    # Of its config.json the text part: the last 20 layers read keys and values of earlier ones, and are twice as wide.
    "gemma4_text": (
        "google/gemma-4-E2B",
        {
            "hidden_size": 1536,
            "intermediate_size": 6144,
            **heads(8, 1, 256),
            "global_head_dim": 512,
            "num_hidden_layers": 35,
            "layer_types": ["full_attention" if index % 5 == 4 else "sliding_attention" for index in range(35)],
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 30.0,
        },
    ),
    "hunyuan_v1_dense": ("tencent/Hunyuan-7B-Instruct", heads(32, 8, 128)),
    "hunyuan_v1_moe": (
        "tencent/Hunyuan-A13B-Instruct",
        {**heads(32, 8, 128), "num_experts": 64, "moe_topk": 8, "moe_intermediate_size": 3072},
    ),
    "lfm2_moe": (
        "LiquidAI/LFM2-8B-A1B",
        {
            "num_hidden_layers": 24,
            "layer_types": ["full_attention" if index in (2, 6, 10, 14, 18, 21) else "conv" for index in range(24)],
        },
    ),
    "ministral": ("mistralai/Ministral-8B-Instruct-2410", {**heads(32, 8, 128), "sliding_window": 32768}),
}


def registered_types() -> list[str]:
    """The model types that transformers registers for causal language modelling."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(CONFIG_MAPPING_NAMES))


def all_architectures() -> list[Architecture]:
    """Those of the table, and one for each registered type that is not in it."""
    named = {architecture.model_type for architecture in ARCHITECTURES}
    others = [
        Architecture(model_type, *of_published(model_type))
        for model_type in registered_types()
        if model_type not in named
    ]
    return [*ARCHITECTURES, *others]


def of_published(model_type: str) -> tuple[str | None, str, Mapping[str, Any]]:
    """Example, type and values of a type that has no name in the table."""
    example, values = PUBLISHED.get(model_type, (None, {}))
    return example, model_type, values

"""The models and settings that are run on fake CUDA tensors, and what is expected of each: one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

K = 1024

# Layers as wide as published ones: how often an operator goes over its tokens depends on that.
_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32 * K,
    "max_position_embeddings": 128 * K,
}
_GEMMA2 = {"hidden_size": 3584, "num_attention_heads": 16, "head_dim": 256, "sliding_window": 512}
_GPT_OSS = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "head_dim": 64,
    "num_local_experts": 8,
    "sliding_window": 128,
}
_QWEN3_MOE = {
    "hidden_size": 2048,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "moe_intermediate_size": 768,
    "num_experts": 16,
}
MODELS: Mapping[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _8B),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {**_8B, "head_dim": 128, "intermediate_size": 12288}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {**_8B, "pad_token_id": 0}),
    "window": (MistralConfig, MistralForCausalLM, {**_8B, "sliding_window": 512}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {**_8B, **_GEMMA2}),
    "gpt-oss": (GptOssConfig, GptOssForCausalLM, {**_8B, **_GPT_OSS}),
    "qwen3-moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {**_8B, **_QWEN3_MOE}),
}


@dataclass(frozen=True)
class Case:
    """One forward and backward.

    Args:
        model: of `MODELS`; dimensions: other than its own.
        length: tokens of a rank.
        documents: of equal length, in the whole sequence.
        settings: of `mst_ds.Settings`.
        fault: is done to the input of the first layer.
    """

    model: str
    dimensions: Mapping[str, Any] = field(default_factory=dict)
    length: int = 2 * K
    layers: int = 2
    documents: int = 1
    sp_size: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    fault: Callable[[Tensor], Any] | None = None


_KEPT = {"recompute": True, "keep_attention": True}
_OFFLOAD = {**_KEPT, "offload_activations": True}
_SHARDED = {"sp_size": 8, "length": 256}
KINDS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "packed": {"documents": 3},
    "sp 8": {**_SHARDED, "settings": {"recompute": True, "head_groups": 2}},
    "sp 8 packed": {**_SHARDED, "documents": 3},
    "offload": {"settings": _OFFLOAD},
    "offload packed": {"documents": 3, "settings": _OFFLOAD},
    "offload sp 8": {**_SHARDED, "settings": _OFFLOAD},
    "offload sp 8 packed": {**_SHARDED, "documents": 3, "settings": _OFFLOAD},
}
# Of other models those that have every two of shards, documents and a store on the host, and what a rank alone runs.
_KINDS_OF_OTHERS = ("plain", "sp 8", "offload packed", "offload sp 8 packed")
CLEAN = {
    f"{model}, {kind}": Case(model, **given)
    for model in MODELS
    for kind, given in KINDS.items()
    if model == "llama" or kind in _KINDS_OF_OTHERS
}

# Layers with experts read once a step how many tokens each expert has, and wait for it.
WAITS_OF_A_LAYER: Mapping[str, int] = {"gpt-oss": 1, "qwen3-moe": 1}

# Faults, and a part of the error that each must be seen as: else clean cases would say nothing.
_FAULTS: Mapping[str, tuple[Callable[[Tensor], Any], str]] = {
    "reads a number": (lambda x: x.sum().item(), "waits for _local_scalar_dense"),
    "finds places": (lambda x: (x > 0).nonzero(), "waits for nonzero"),
    "copies a list": (lambda x: torch.tensor([1, 2], device=x.device), "waits for _to_copy between devices"),
    "copies back": (lambda x: x.cpu(), "waits for _to_copy between devices"),
    "mixes devices": (lambda x: x + torch.ones(x.shape[-1]), "cuda:0"),
}
FAULTS = {f"llama that {name}": (Case("llama", layers=1, fault=fault), part) for name, (fault, part) in _FAULTS.items()}

# An 8B layer in four chunks: it launches at most so much, in its forward and in its backward.
LAUNCHES: Mapping[str, tuple[Case, int, int]] = {
    f"launches at {length}K tokens": (
        Case("llama", length=length * K, layers=1, settings={**_KEPT, "mlp_chunks": 4}),
        forward,
        backward,
    )
    for length, forward, backward in ((8, 31, 102), (128, 31, 108))
}

# The same tokens in few and in many documents: each further one costs a layer at most so many launches.
FEW, MANY = 4, 32
DOCUMENTS = {f"{count} documents": Case("llama", length=8 * K, layers=1, documents=count) for count in (FEW, MANY)}
LAUNCHES_OF_A_DOCUMENT = {"forward": 0, "backward": 0}

# Few and many experts: a layer launches the same.
EXPERTS = {
    f"{count} experts": Case("qwen3-moe", {"num_experts": count}, length=8 * K, layers=1, settings=_KEPT)
    for count in (32, 128)
}

CASES: Mapping[str, Case] = {
    **CLEAN,
    **{name: case for name, (case, _) in FAULTS.items()},
    **{name: case for name, (case, _, _) in LAUNCHES.items()},
    **DOCUMENTS,
    **EXPERTS,
}

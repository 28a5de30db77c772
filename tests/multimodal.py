"""Multimodal models of a few thousand parameters, and folders of them as they are published."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    GenerationConfig,
    Llama4Config,
    Mistral3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
)

from mst_ds.data.tokenizer import byte_tokenizer

# Bytes and the end of a text, and a few tokens that stand for images.
_LANGUAGE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
_SIGHT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_QWEN_SIGHT = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "out_hidden_size": 32}
_QWEN_SIGHT |= {"patch_size": 4, "num_position_embeddings": 16}
_GATED_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
_GATED_DELTA |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_EXPERTS |= {"shared_expert_intermediate_size": 16}
_QWEN_TOKENS = {"image_token_id": 260, "video_token_id": 261, "vision_start_token_id": 262, "vision_end_token_id": 263}


def _gemma3() -> PreTrainedConfig:
    kinds = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return Gemma3Config(
        text_config=_LANGUAGE | kinds,
        vision_config=_SIGHT | {"intermediate_size": 24},
        mm_tokens_per_image=4,
        image_token_index=260,
        boi_token_index=261,
        eoi_token_index=262,
        eos_token_id=[256, 3],
    )


def _qwen3_5() -> PreTrainedConfig:
    return Qwen3_5Config(text_config=_LANGUAGE | _GATED_DELTA, vision_config=_QWEN_SIGHT, **_QWEN_TOKENS)


def _qwen3_5_moe() -> PreTrainedConfig:
    language = _LANGUAGE | _GATED_DELTA | _EXPERTS
    return Qwen3_5MoeConfig(text_config=language, vision_config=_QWEN_SIGHT, **_QWEN_TOKENS)


def _mistral3() -> PreTrainedConfig:
    """Its own config ties the head, that of its language model does not, which is without effect."""
    language = {**_LANGUAGE, "model_type": "mistral", "tie_word_embeddings": False}
    vision: dict[str, Any] = {**_SIGHT, "model_type": "pixtral", "intermediate_size": 24}
    return Mistral3Config(text_config=language, vision_config=vision, image_token_index=260)


def _llama4() -> PreTrainedConfig:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    kinds = {"no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 64}
    widths = {"intermediate_size": 64, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
    return Llama4Config(
        text_config=_LANGUAGE | experts | kinds,
        vision_config=_SIGHT | widths,
        image_token_index=260,
        boi_token_index=261,
        eoi_token_index=262,
    )


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": _gemma3,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5_moe,
    "mistral3": _mistral3,
    "llama4": _llama4,
}


def multimodal_model(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same random weights every time."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(CONFIGS[name](), dtype=dtype)
    return model


def multimodal_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """With the tokenizer, and with files of a processor."""
    model = multimodal_model(name, dtype)
    model.generation_config = GenerationConfig(eos_token_id=[256, 3], pad_token_id=256)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    for file in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        (folder / file).write_text('{"size": 28}', encoding="utf-8")
    return folder

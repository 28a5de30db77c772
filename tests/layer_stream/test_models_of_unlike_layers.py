"""Models whose layers have heads and MLPs of their own, or read keys of earlier ones: the plain model's gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from plain_model import assert_close, loss_and_gradients
from sharded import sharded_loss_and_gradients
from streamed_models import BATCH, KEPT, NO_RECOMPUTE, patched
from tiers import slow_but_for
from tiny_models import build
from transformers import (
    Dots3NoteForCausalLM,
    Dots3NoteTextConfig,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    PreTrainedModel,
)

# Two layers that hand on keys and values, one of each kind, and two that read them.
SHARING = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 8,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 97,
    "final_logit_softcapping": 3.0,
}
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gemma4": (Gemma4TextConfig, Gemma4ForCausalLM, {**SHARING, "global_head_dim": 16, "use_double_wide_mlp": True}),
    "gemma4-values-of-keys": (
        Gemma4TextConfig,
        Gemma4ForCausalLM,
        {
            **SHARING,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 0,
            "global_head_dim": 16,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
    ),
    "gemma3n": (
        Gemma3nTextConfig,
        Gemma3nForCausalLM,
        {
            **SHARING,
            "altup_num_inputs": 3,
            "laurel_rank": 4,
            "intermediate_size": [48, 40, 48, 32],
            "activation_sparsity_pattern": [0.9, 0.0, 0.9, 0.0],
        },
    ),
    # Query heads of their own, of two widths.
    "dots3-note": (
        Dots3NoteTextConfig,
        Dots3NoteForCausalLM,
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "use_dsa": False,
            "sliding_window": 8,
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "head_dim": 16,
            **{f"swa_{name}": 2 for name in ("num_attention_heads", "num_key_value_heads")},
            **{f"swa_{name}_lora_rank": rank for name, rank in {"q": 12, "kv": 16}.items()},
            **{f"swa_{name}": size for name, size in {"head_dim": 20, "qk_nope_head_dim": 12, "v_head_dim": 8}.items()},
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_experts_intermediate_size": 16,
            "experts_implementation": "eager",
        },
    ),
}
HOW = [{"layer_chunks": chunks, **KEPT[kept].values[0]} for chunks, kept in ((1, 0), (4, 0), (4, 3))]
CHUNKS = {"layer_chunks": 4, "keep_attention": True}
EACH = pytest.mark.parametrize("name", MODELS)


@functools.cache
def model_of(name: str) -> PreTrainedModel:
    config_class, model_class, values = MODELS[name]
    return build(config_class, model_class, **values)


@functools.cache
def plain(name: str) -> Any:
    return loss_and_gradients(model_of(name), **BATCH)


@EACH
@pytest.mark.parametrize("settings", slow_but_for(HOW[1:], HOW), ids=str)
def test_gradients_are_the_plain_models(name: str, settings: dict[str, Any]) -> None:
    model = patched(model_of(name), mlp_chunks=3, **settings)
    assert_close(loss_and_gradients(model, **BATCH), plain(name))


@EACH
@pytest.mark.parametrize("settings", slow_but_for([CHUNKS], [NO_RECOMPUTE, CHUNKS]), ids=str)
def test_gradients_are_the_plain_models_on_shards(name: str, settings: dict[str, Any]) -> None:
    assert_close(sharded_loss_and_gradients(model_of(name), BATCH, **settings), plain(name))


def test_packed_documents_on_shards() -> None:
    rows = ([21, 27, 16], [64])
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    labels = BATCH["labels"].masked_fill(positions == 0, -100)
    batch, model = {**BATCH, "labels": labels, "position_ids": positions}, model_of("gemma4")
    expected = loss_and_gradients(patched(model, **NO_RECOMPUTE), **batch)
    assert_close(sharded_loss_and_gradients(model, batch, layer_chunks=4), expected)


def test_logits_of_the_last_token_alone() -> None:
    """The model itself would go on with that token alone, from the layers that read earlier ones' keys on."""
    model, ids = model_of("gemma4"), BATCH["input_ids"]
    with torch.no_grad():
        logits = patched(model, layer_chunks=4)(input_ids=ids, logits_to_keep=1).logits
        expected = model(input_ids=ids, logits_to_keep=1).logits
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)

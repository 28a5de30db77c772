"""Hybrid models under ZeRO-3 on two ranks that share packed sequences: steps of the plain model on each document."""

from __future__ import annotations

from typing import Any

import pytest
from distributed import run_ranks
from steps_of_documents import each_document_alone, sharded_and_packed
from tiers import slow_but_for

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 99,
    "layer_types": ["linear_attention", "full_attention"],
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**SIZES, **DELTA, "head_dim": 16},
    "granitemoehybrid": {
        **SIZES,
        "mamba_n_heads": 6,
        "mamba_d_state": 8,
        "mamba_chunk_size": 16,
        "num_local_experts": 0,
    },
    # The second layer takes the picks of the first; with many heads hardly a score is 0, and picked or not by chance.
    "glm_moe_dsa": {
        **SIZES,
        "num_key_value_heads": 6,
        "layer_types": ["indexed_attention"] * 2,
        "indexer_types": ["full", "shared"],
        "mlp_layer_types": ["dense"] * 2,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "index_head_dim": 8,
        "index_n_heads": 16,
        "index_topk": 16,
    },
}
# fp32 sums in another order; measured: gradients up to 5.3e-6, losses up to 1.3e-7.
TOLERANCE = 1e-5
SETTINGS: list[dict[str, Any]] = [{"recompute": True}, {"recompute": False}]


@pytest.mark.parametrize("model_type", slow_but_for([], MODELS))
def test_steps_are_those_of_each_document_alone(model_type: str) -> None:
    values = MODELS[model_type]
    reference = each_document_alone(model_type, values)
    for outcome in run_ranks(sharded_and_packed, 2, model_type, values, SETTINGS)[0]:
        # Of what plain transformers gives none, such as an indexer, DeepSpeed has one of 0.
        for name in outcome.gradients.keys() - reference.gradients.keys():
            assert not outcome.gradients.pop(name).any(), name
        assert outcome.worst_loss_error(reference) <= TOLERANCE
        error, name = outcome.worst_gradient_error(reference)
        assert error <= TOLERANCE, name

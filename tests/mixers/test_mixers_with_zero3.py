"""Hybrid models under ZeRO-3 on two ranks that share packed sequences: steps of the plain model on each document."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from steps import build_engine, train, zero_block
from tiers import slow_but_for
from tiny import LEARNING_RATE, Outcome, samples, tiny_settings
from transformers import AutoConfig, AutoModelForCausalLM

from mst_ds import apply_settings
from mst_ds.data import IGNORE_INDEX, Batch, shard
from mst_ds.topology import Topology

STEPS = 3
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
# The shards meet at 66, inside the second document of the first row.
LENGTHS = ([40, 70, 1, 20], [66, 65])
# fp32 sums in another order; measured: gradients up to 5.3e-6, losses up to 1.3e-7.
TOLERANCE = 1e-5


def model_of(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type])).train()


def packed() -> Batch:
    batch = samples(2, sum(LENGTHS[0]))
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    labels = batch["input_ids"].masked_fill(positions == 0, IGNORE_INDEX)
    return {"input_ids": batch["input_ids"], "labels": labels, "position_ids": positions}


def each_document_alone(model_type: str) -> Outcome:
    model, batch = model_of(model_type), packed()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    num_items = int((batch["labels"] != IGNORE_INDEX).sum())
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for row, lengths in zip(batch["input_ids"], LENGTHS, strict=True):
            for ids in row[None].split(lengths, dim=1):
                if ids.shape[1] > 1:
                    loss = model(input_ids=ids, labels=ids, num_items_in_batch=num_items).loss
                    loss.backward()
                    total += loss.item()
        losses.append(total)
        if step == 0:
            # An indexer has none.
            trained = [(name, each) for name, each in model.named_parameters() if each.grad is not None]
            gradients = {name: parameter.grad.clone() for name, parameter in trained}
        optimizer.step()
    return Outcome(losses, gradients)


def sharded_and_packed(rank: int, model_type: str) -> list[Outcome]:
    topology, outcomes = Topology(rank, 2, 2), []
    for recompute in (True, False):
        model = apply_settings(model_of(model_type), tiny_settings(2, recompute=recompute), zero_stage=3)
        engine = build_engine(model, zero_optimization=zero_block(3))
        outcomes.append(train(engine, [shard(packed(), topology)], STEPS))
        engine.destroy()
    return outcomes


@pytest.mark.parametrize("model_type", slow_but_for([], MODELS))
def test_steps_are_those_of_each_document_alone(model_type: str) -> None:
    reference = each_document_alone(model_type)
    for outcome in run_ranks(sharded_and_packed, 2, model_type)[0]:
        # Of what plain transformers gives none DeepSpeed has one of 0.
        for name in outcome.gradients.keys() - reference.gradients.keys():
            assert not outcome.gradients.pop(name).any(), name
        assert outcome.worst_loss_error(reference) <= TOLERANCE
        error, name = outcome.worst_gradient_error(reference)
        assert error <= TOLERANCE, name

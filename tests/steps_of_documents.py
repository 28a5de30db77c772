"""Training steps on packed sequences that two ranks share under ZeRO-3, and the plain model's on each document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from steps import build_engine, train, zero_block
from tiny import LEARNING_RATE, Outcome, samples, tiny_settings
from transformers import AutoConfig, AutoModelForCausalLM

from mst_ds import apply_settings
from mst_ds.data import IGNORE_INDEX, Batch, shard
from mst_ds.topology import Topology

STEPS = 3
# The shards meet at 66, inside the second document of the first row.
LENGTHS = ([40, 70, 1, 20], [66, 65])


def model_of(model_type: str, values: Mapping[str, Any]) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **values)).train()


def packed() -> Batch:
    batch = samples(2, sum(LENGTHS[0]))
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    labels = batch["input_ids"].masked_fill(positions == 0, IGNORE_INDEX)
    return {"input_ids": batch["input_ids"], "labels": labels, "position_ids": positions}


def each_document_alone(model_type: str, values: Mapping[str, Any]) -> Outcome:
    model, batch = model_of(model_type, values), packed()
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
            trained = [(name, each) for name, each in model.named_parameters() if each.grad is not None]
            gradients = {name: parameter.grad.clone() for name, parameter in trained}
        optimizer.step()
    return Outcome(losses, gradients)


def sharded_and_packed(
    rank: int, model_type: str, values: Mapping[str, Any], settings: list[dict[str, Any]]
) -> list[Outcome]:
    """The steps with each of these settings."""
    topology, outcomes = Topology(rank, 2, 2), []
    for each in settings:
        model = apply_settings(model_of(model_type, values), tiny_settings(2, **each), zero_stage=3)
        engine = build_engine(model, zero_optimization=zero_block(3))
        batch = shard(packed(), topology, layer_chunks=each.get("layer_chunks", 1))
        outcomes.append(train(engine, [batch], STEPS))
        engine.destroy()
    return outcomes

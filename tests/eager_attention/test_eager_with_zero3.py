"""Attention that is written out under ZeRO-3, on two ranks that share packed sequences: steps of documents alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import run_ranks
from steps import build_engine, train, zero_block
from tiny import LEARNING_RATE, Outcome, samples, tiny_settings
from transformers import BloomConfig, BloomForCausalLM

from mst_ds import apply_settings
from mst_ds.data import IGNORE_INDEX, Batch, shard
from mst_ds.topology import Topology

STEPS = 3
# The shards meet at 66, inside the second document of the first row.
LENGTHS = ([40, 70, 1, 20], [66, 65])
# fp32 sums in another order.
TOLERANCE = 1e-5


def model() -> Any:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(hidden_size=48, n_layer=2, n_head=6, vocab_size=99)).train()


def packed() -> Batch:
    batch = samples(2, sum(LENGTHS[0]))
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in LENGTHS])
    labels = batch["input_ids"].masked_fill(positions == 0, IGNORE_INDEX)
    return {"input_ids": batch["input_ids"], "labels": labels, "position_ids": positions}


def each_document_alone() -> Outcome:
    plain, batch = model(), packed()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LEARNING_RATE)
    num_items = int((batch["labels"] != IGNORE_INDEX).sum())
    losses, gradients = [], {}
    for step in range(STEPS):
        optimizer.zero_grad()
        documents = [
            ids
            for row, lengths in zip(batch["input_ids"], LENGTHS, strict=True)
            for ids in row[None].split(lengths, dim=1)
            if ids.shape[1] > 1
        ]
        parts = [plain(input_ids=ids, labels=ids, num_items_in_batch=num_items).loss for ids in documents]
        torch.stack(parts).sum().backward()
        losses.append(sum(part.item() for part in parts))
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in plain.named_parameters()}
        optimizer.step()
    return Outcome(losses, gradients)


def sharded_and_packed(rank: int) -> list[Outcome]:
    topology, outcomes = Topology(rank, 2, 2), []
    for recompute, layer_chunks in ((True, 4), (False, 1)):
        settings = tiny_settings(2, recompute=recompute, layer_chunks=layer_chunks, mlp_chunks=1)
        engine = build_engine(apply_settings(model(), settings, zero_stage=3), zero_optimization=zero_block(3))
        outcomes.append(train(engine, [shard(packed(), topology, layer_chunks=layer_chunks)], STEPS))
        engine.destroy()
    return outcomes


@pytest.mark.slow
def test_steps_are_those_of_each_document_alone() -> None:
    reference = each_document_alone()
    for outcome in run_ranks(sharded_and_packed, 2)[0]:
        assert outcome.worst_loss_error(reference) <= TOLERANCE
        error, name = outcome.worst_gradient_error(reference)
        assert error <= TOLERANCE, name

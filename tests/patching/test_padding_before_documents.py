"""Padding before a document decides nothing where a model counts its positions by the mask, or reads that one is 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_model import assert_close, loss_and_gradients, make_batch
from sharded import sharded_loss_and_gradients
from tiny import tiny_settings
from tiny_models import build
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from mst_ds import apply_settings

LENGTH, BEFORE = 30, 9
# A bias of keys has no gradient but for rounding.
_OF_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "enable_bias": False}
MODELS: dict[str, tuple[Any, ...]] = {
    "opt": (OPTConfig, OPTForCausalLM, _OF_OPT),
    "recurrent_gemma": (
        RecurrentGemmaConfig,
        RecurrentGemmaForCausalLM,
        {"lru_width": 32, "attention_window_size": 16, "block_types": ["recurrent", "attention"]},
    ),
}


def model_of(name: str) -> PreTrainedModel:
    config_class, model_class, values = MODELS[name]
    return build(config_class, model_class, **values)


def padded() -> dict[str, Tensor]:
    batch = make_batch(LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :BEFORE] = 0
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    labels[1, BEFORE] = -100
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels}


def each_alone(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients of the plain model, without padding."""
    total: dict[str, Tensor] = {}
    count = int((batch["labels"][:, 1:] != -100).sum())
    for row, first in enumerate((0, BEFORE)):
        ids = batch["input_ids"][row : row + 1, first:]
        for key, value in loss_and_gradients(model, input_ids=ids, labels=ids, num_items_in_batch=count).items():
            total[key] = total.get(key, 0) + value.clone()
    return total


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_a_document_after_padding_trains_as_alone(name: str, sp_size: int) -> None:
    model, batch = model_of(name), padded()
    expected = each_alone(model_of(name), batch)
    if sp_size == 1:
        found = loss_and_gradients(apply_settings(model, tiny_settings(recompute=True)), **batch)
    else:
        found = sharded_loss_and_gradients(model, batch, sp_size)
    assert_close(found, expected)

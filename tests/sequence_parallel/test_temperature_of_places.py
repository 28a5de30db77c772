"""Llama 4 scales queries by their places in what a layer is given: a shard's, a chunk's and a packed document's differ
from the positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_model import assert_close, loss_and_gradients, make_batch
from sharded import sharded_loss_and_gradients
from tiny import tiny_settings
from transformers import Llama4ForCausalLM, Llama4TextConfig

from mst_ds import apply_settings

LENGTH = 32
PACKED = {"position_ids": torch.cat([torch.arange(20), torch.arange(12)]).expand(2, -1)}


def llama_4(floor_scale: int) -> Llama4ForCausalLM:
    """Two layers of which one has no rotary embedding, and scales."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=8,
        intermediate_size_mlp=16,
        num_hidden_layers=2,
        no_rope_layers=[1, 0],
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        attention_chunk_size=8,
        floor_scale=floor_scale,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Llama4ForCausalLM(config).double().train()


@pytest.mark.parametrize(("layer_chunks", "documents"), [(2, {}), (1, PACKED)], ids=["chunks", "packed"])
def test_other_places_are_refused_where_they_count(layer_chunks: int, documents: dict[str, Any]) -> None:
    model = apply_settings(llama_4(LENGTH), tiny_settings(mlp_chunks=1, layer_chunks=layer_chunks))
    with pytest.raises(ValueError, match=r"scales its queries by their places .* of 32 tokens; allowed: fewer than 32"):
        model(**make_batch(LENGTH), **documents)


def test_a_shards_places_are_refused_where_they_count_and_exact_before() -> None:
    batch = make_batch(LENGTH)
    with pytest.raises(ValueError, match=r"allowed: fewer than 32"):
        sharded_loss_and_gradients(llama_4(LENGTH), batch, mlp_chunks=1)
    below = llama_4(LENGTH + 1)
    plain = {name: value.clone() for name, value in loss_and_gradients(below, **batch).items()}
    below.zero_grad()
    assert_close(sharded_loss_and_gradients(below, batch, mlp_chunks=1), plain)


def test_a_whole_row_is_scaled_as_the_plain_model_does() -> None:
    batch, model = make_batch(LENGTH), llama_4(4)
    plain = {name: value.clone() for name, value in loss_and_gradients(model, **batch).items()}
    assert_close(loss_and_gradients(apply_settings(model, tiny_settings(mlp_chunks=1)), **batch), plain)

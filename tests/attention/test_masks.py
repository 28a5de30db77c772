"""What models ask for through transformers' mask and attention interfaces, and what they then compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, masking_utils

from mst_ds.attention import AttentionBlocks, SlidingWindow
from mst_ds.sequence_parallel import (
    ATTENTION_NAME,
    SequenceGroup,
    UlyssesContext,
    register_attention,
    run_simulated,
)

LENGTH = 12


def made_by(make: str, **arguments: Any) -> Any:
    register_attention()
    config = LlamaConfig(sliding_window=5, attention_chunk_size=4)
    config._attn_implementation = ATTENTION_NAME
    allowed = {
        "config": config,
        "inputs_embeds": torch.zeros(1, LENGTH, 8),
        "attention_mask": None,
        "past_key_values": None,
    }
    return getattr(masking_utils, make)(**(allowed | arguments))


def test_what_stands_for_a_mask_may_be_cut_where_nothing_is_cut_off() -> None:
    for mask in (SlidingWindow(5), AttentionBlocks(4)):
        assert mask[:, :, slice(-0, None), :] is mask
        with pytest.raises(ValueError, match="leaves out tokens of its mask"):
            mask[:, :, -1:, :]


@pytest.mark.parametrize("positions", [torch.arange(LENGTH)[None], torch.arange(LENGTH)[None] % 7])
def test_no_mask_is_built(positions: Tensor) -> None:
    assert made_by("create_causal_mask", position_ids=positions) is None
    assert made_by("create_sliding_window_causal_mask", position_ids=positions) == SlidingWindow(5)
    assert made_by("create_chunked_causal_mask", position_ids=positions) == AttentionBlocks(4)


@pytest.mark.parametrize(
    ("make", "arguments", "says"),
    [
        (
            "create_chunked_causal_mask",
            {"and_mask_function": masking_utils.sliding_window_overlay(3)},
            "a sliding window within blocks",
        ),
        ("create_causal_mask", {"or_mask_function": lambda b, h, q, k: q == k}, "or_masks"),
        ("create_causal_mask", {"and_mask_function": lambda b, h, q, k: q == k}, "<lambda>"),
        ("create_causal_mask", {"block_sequence_ids": torch.zeros(1, LENGTH, dtype=torch.long)}, "or_masks"),
        ("create_bidirectional_mask", {}, "bidirectional_mask_function"),
    ],
)
def test_masks_that_attention_cannot_do_are_refused(make: str, arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made_by(make, **arguments)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
MODELS = {
    "mistral": {"sliding_window": 5, "head_dim": 8},
    # A window in the mask alone; scores with a softcap; sinks, every second layer with a window; values narrower than
    # keys; blocks within which tokens see each other.
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2, **EXPERTS},
    "gemma2": {"sliding_window": 5, "head_dim": 8, "attn_logit_softcapping": 2.0},
    "gpt_oss": {"sliding_window": 5, "head_dim": 8, **EXPERTS},
    "deepseek_v3": {**LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 2},
    "llama4_text": {"attention_chunk_size": 4, "head_dim": 8, "intermediate_size_mlp": 48, **EXPERTS},
}


@pytest.mark.parametrize("name", MODELS)
def test_models_compute_what_they_do_with_eager_attention(name: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**TINY, **MODELS[name]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    model = model.double().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    ids = torch.randint(64, (1, LENGTH))
    documents = [model(input_ids=part, use_cache=False).logits for part in ids.split([9, LENGTH - 9], dim=1)]
    positions = torch.cat([torch.arange(9), torch.arange(LENGTH - 9)])[None]
    register_attention()
    model.set_attn_implementation(ATTENTION_NAME)

    def logits(group: SequenceGroup) -> Tensor:
        shard = {
            "input_ids": ids.chunk(2, dim=1)[group.rank],
            "position_ids": positions.chunk(2, dim=1)[group.rank],
        }
        return model(**shard, use_cache=False, ulysses=UlyssesContext(group, "sdpa", [[0, 9]])).logits

    # Norms, rotary embeddings and most models' softmax are in fp32.
    torch.testing.assert_close(
        torch.cat(run_simulated(logits, 2), dim=1), torch.cat(documents, dim=1), rtol=2e-6, atol=2e-6
    )

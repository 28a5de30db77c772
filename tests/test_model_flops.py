"""The FLOPs of a model for one token, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import DeepseekV3Config, Gemma2Config, GPT2Config, LlamaConfig, MixtralConfig

from mst_ds.model_shape import ModelShape, flops_per_token


def tiny_shape(*, tied: bool) -> ModelShape:
    config = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        vocab_size=10,
        tie_word_embeddings=tied,
    )
    return ModelShape.from_config(config)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_by_hand(tied: bool) -> None:
    query_and_output, key_and_value = 2 * 8 * 16, 2 * 8 * 8
    layer = query_and_output + key_and_value + 3 * 8 * 16 + 2 * 8  # + MLP + two norms
    multiplied = 2 * layer + 8 + 10 * 8  # + final norm + head; the embedding counts only as the tied head
    assert flops_per_token(tiny_shape(tied=tied), 100) == 6 * multiplied + 6 * 2 * 16 * 100


def test_flops_are_those_of_the_experts_that_a_token_meets() -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 3, "vocab_size": 10}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 7, "num_experts_per_tok": 2}
    one_more = MixtralConfig(**sizes | {"num_experts_per_tok": 3})
    difference = [flops_per_token(ModelShape.from_config(config), 100) for config in (one_more, MixtralConfig(**sizes))]
    assert difference[0] - difference[1] == 6 * 3 * (3 * 8 * 16)  # in three layers one more expert of three matrices


def test_positions_are_looked_up_and_not_multiplied() -> None:
    shapes = [ModelShape.from_config(GPT2Config(n_positions=length)) for length in (100, 200)]
    assert flops_per_token(shapes[0], 100) == flops_per_token(shapes[1], 100)


def test_latent_attention_has_values_of_another_width() -> None:
    config = DeepseekV3Config(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        qk_rope_head_dim=8,
        qk_nope_head_dim=12,
        v_head_dim=10,
    )
    short, long = (flops_per_token(ModelShape.from_config(config), seq_len) for seq_len in (100, 300))
    # Products with keys of 20 and with values of 10, forward and backward, over 100 tokens more on average.
    assert long - short == 2 * 3 * 2 * 4 * (20 + 10) * 100


@pytest.mark.parametrize(("seq_len", "window"), [(100, 10), (100, 100), (100, 1000)])
def test_a_sliding_window_bounds_what_a_token_attends_to(seq_len: int, window: int) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 10}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
    kinds = {
        kind: ModelShape.from_config(Gemma2Config(**sizes, sliding_window=window, layer_types=["full_attention", kind]))
        for kind in ("full_attention", "sliding_attention")
    }
    full, sliding = (flops_per_token(shape, seq_len) for shape in kinds.values())
    # One layer's, over a triangle of scores without the one that lies outside of the window.
    width = max(0, seq_len - window)
    assert full - sliding == pytest.approx(12 * 4 * 4 * (width**2 / 2) / seq_len)

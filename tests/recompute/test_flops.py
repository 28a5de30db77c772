"""What a step computes: attention once where it is kept, of the MLP in the backward at most gate and up again."""

import copy

import pytest
import torch
from count_products import CountProducts
from tiny import tiny_llama, tiny_settings
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
)

from benchmarks.flops import count_flops
from mst_ds import apply_settings

LENGTH, HIDDEN, LAYERS = 32, 48, 3
DIMENSIONS = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
    "pad_token_id": 0,
}
IDS = torch.arange(LENGTH)[None]


def llama(intermediate_size):
    return tiny_llama(num_hidden_layers=LAYERS, intermediate_size=intermediate_size)


def olmo2(intermediate_size):
    torch.manual_seed(0)
    return Olmo2ForCausalLM(Olmo2Config(**DIMENSIONS, intermediate_size=intermediate_size)).train()


def gemma2(intermediate_size):
    torch.manual_seed(0)
    # transformers' own sdpa attention has no softcap.
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    return Gemma2ForCausalLM(Gemma2Config(**DIMENSIONS, **caps, intermediate_size=intermediate_size)).train()


def step_counts(model, **settings):
    """Of the second step: in the first, layers find out whose output nobody reads."""
    model = apply_settings(copy.deepcopy(model), tiny_settings(**settings))

    def step():
        model(input_ids=IDS, labels=IDS).loss.backward()

    step()
    return count_flops(step)


def products_of_the_mlp(make, **settings):
    """A step's products of an MLP, in units of one of its projections: what grows with the intermediate size."""
    few, many = (step_counts(make(size), **settings).matrix for size in (64, 96))
    return (many - few) / (2 * LENGTH * HIDDEN * (96 - 64) * LAYERS)


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("mlp_chunks", [1, 4])
def test_kept_attention_runs_once(mlp_chunks, offload):
    counts = step_counts(llama(64), keep_attention=True, offload_activations=offload, mlp_chunks=mlp_chunks)
    assert (counts.attention_forwards, counts.attention_backwards) == (LAYERS, LAYERS)


def test_attention_with_a_window_that_hides_nothing_is_kept():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**DIMENSIONS, intermediate_size=64, sliding_window=LENGTH)).train()
    counts = step_counts(model, keep_attention=True)
    assert (counts.attention_forwards, counts.attention_backwards) == (LAYERS, LAYERS)


@pytest.mark.parametrize("layer_chunks", [2, 8])
def test_kept_attention_in_chunks_computes_what_it_does_whole(layer_chunks):
    """A chunk attends to itself and in one call to all before it; in the backward to each."""
    whole = step_counts(llama(64), keep_attention=True)
    counts = step_counts(llama(64), keep_attention=True, layer_chunks=layer_chunks)
    assert counts.attention == whole.attention
    assert counts.attention_forwards == LAYERS * (2 * layer_chunks - 1)
    assert counts.attention_backwards == LAYERS * layer_chunks * (layer_chunks + 1) // 2


def test_attention_that_is_not_kept_runs_twice():
    counts = step_counts(llama(64), keep_attention=False)
    assert (counts.attention_forwards, counts.attention_backwards) == (2 * LAYERS, LAYERS)


def test_without_recompute_attention_runs_once():
    counts = step_counts(llama(64), recompute=False, keep_attention=False)
    assert (counts.attention_forwards, counts.attention_backwards) == (LAYERS, LAYERS)


@pytest.mark.parametrize(("recompute", "layer_chunks"), [(True, 1), (True, 4), (False, 1)])
@pytest.mark.parametrize("mlp_chunks", [1, 4])
def test_down_projection_is_never_computed_again(mlp_chunks, recompute, layer_chunks):
    # 3 in the forward; in the backward gate and up again, and two gradients for each of the three.
    settings = {"recompute": recompute, "keep_attention": recompute, "mlp_chunks": mlp_chunks}
    settings["layer_chunks"] = layer_chunks
    assert products_of_the_mlp(llama, **settings) == 11


@pytest.mark.parametrize("make", [llama, olmo2, gemma2])
@pytest.mark.parametrize("mlp_chunks", [1, 4])
def test_with_gate_and_up_kept_nothing_is_computed_again(mlp_chunks, make):
    assert products_of_the_mlp(make, recompute=False, keep_mlp=True, mlp_chunks=mlp_chunks) == 9


@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
@pytest.mark.parametrize(("make", "products"), [(llama, 9), (olmo2, 10), (gemma2, 10)])
def test_gate_and_up_are_kept_where_layers_are_computed_again_too(make, products, offload):
    # A norm after the MLP needs the down projection once more.
    settings = {"keep_attention": True, "keep_mlp": True, "offload_activations": offload, "mlp_chunks": 4}
    assert products_of_the_mlp(make, **settings) == products


@pytest.mark.parametrize("layer_chunks", [1, 4])
@pytest.mark.parametrize("make", [olmo2, gemma2])
def test_a_norm_after_the_mlp_needs_its_output_again(make, layer_chunks):
    # Three in the forward, three again, gate and up once more where the MLP is differentiated, and six gradients.
    assert products_of_the_mlp(make, keep_attention=True, layer_chunks=layer_chunks) == 14


def test_the_first_chunk_that_is_computed_again_tells_whose_output_nobody_reads():
    model = apply_settings(llama(64), tiny_settings(keep_attention=True, layer_chunks=4, mlp_chunks=1))
    downs = []
    for _ in range(2):
        with CountProducts() as counted:
            model(input_ids=IDS, labels=IDS).loss.backward()
        downs.append(counted.shapes[(LENGTH // 4, HIDDEN)])
    # In the first step one chunk of a layer has its down projection computed again, later none.
    assert downs[0] - downs[1] == LAYERS


def test_kept_attention_runs_once_where_a_norm_follows_it_too():
    counts = step_counts(olmo2(64), keep_attention=True)
    assert (counts.attention_forwards, counts.attention_backwards) == (LAYERS, LAYERS)

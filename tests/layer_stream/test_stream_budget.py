"""The error budget of a layer in chunks: in bf16 no gradient is further from fp64 than the plain layer's."""

import copy
import functools
import math

import pytest
import torch
from error_budget import EPS, FACTOR, relative_errors
from tiny import tiny_settings
from tiny_models import build
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mst_ds import apply_settings

LENGTH, HIDDEN = 256, 64
SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "max_position_embeddings": LENGTH}
# Norms, of heads too, and every bias that a layer has.
WITH_NORMS_OF_HEADS = {"intermediate_size": 96, "head_dim": 32, "num_key_value_heads": 4, "attention_bias": True}
# Sinks, a router and experts with biases. All experts have all tokens, or the error would be that of the choice: where
# bf16 takes another expert than fp64 it is 20 times as large, and whose draws have more such tokens is luck.
OF_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 8, "experts_implementation": "eager"}
WITH_EXPERTS = {
    **OF_EXPERTS,
    "intermediate_size": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 8,
    "layer_types": ["full_attention"],
}
# Luck in the rounding of a short bias is more than 5% of its error. Of 128 numbers and more, so often drawn, it is not;
# sinks have 16, the router's bias has 8.
LAYERS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, WITH_NORMS_OF_HEADS, 3),
    "gpt-oss": (GptOssConfig, GptOssForCausalLM, WITH_EXPERTS, 8),
}


@functools.cache
def one_layer(name):
    """Without the last norm, which is not in it."""
    config_class, model_class, settings, _ = LAYERS[name]
    model = build(config_class, model_class, **SIZES, **settings)
    model.model.norm = torch.nn.Identity()
    return model.bfloat16()


def output_and_gradients(model, x, grad_output):
    model.zero_grad()
    x = x.clone().requires_grad_()
    output = model.model(inputs_embeds=x, use_cache=False).last_hidden_state
    output.backward(grad_output.to(output.dtype))
    parameters = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return {"output": output.detach(), "input": x.grad, **parameters}


@functools.cache
def draws(name):
    """Inputs, incoming gradients with a mean, so that sums over tokens do not cancel, and what fp64 makes of them."""
    torch.manual_seed(1)
    truth = copy.deepcopy(one_layer(name)).double()
    made = []
    for _ in range(LAYERS[name][-1]):
        x, grad_output = torch.randn(1, LENGTH, HIDDEN).bfloat16(), (torch.randn(1, LENGTH, HIDDEN) + 0.3).bfloat16()
        made.append((x, grad_output, output_and_gradients(truth, x.double(), grad_output.double())))
    return made


def errors(name, model):
    """By tensor, over all draws of a layer."""
    found = [relative_errors(output_and_gradients(model, x, dy), truth) for x, dy, truth in draws(name)]
    return {tensor: math.sqrt(sum(each[tensor] ** 2 for each in found) / len(found)) for tensor in found[0]}


@functools.cache
def errors_of_the_plain_layer(name):
    return errors(name, copy.deepcopy(one_layer(name)))


OF_QWEN3, OF_GPT_OSS = ("qwen3", 2 + 2 + 2 + 4 + 4 + 3), ("gpt-oss", 2 + 2 + 1 + 4 + 4 + 2 + 4)


@pytest.mark.parametrize(
    ("name", "tensors", "layer_chunks"),
    [(*OF_QWEN3, 4), (*OF_QWEN3, 64), (*OF_GPT_OSS, 4), pytest.param(*OF_GPT_OSS, 64, marks=pytest.mark.slow)],
)
def test_error_budget_of_every_parameter(name, tensors, layer_chunks):
    settings = tiny_settings(layer_chunks=layer_chunks, mlp_chunks=1, keep_attention=True)
    found = errors(name, apply_settings(copy.deepcopy(one_layer(name)), settings))
    reference = errors_of_the_plain_layer(name)
    assert len(found) == tensors
    # Not `>`: a NaN must be over the budget.
    over = {
        tensor: (error, reference[tensor])
        for tensor, error in found.items()
        if not error <= reference[tensor] * FACTOR + EPS
    }
    assert not over, f"errors (chunks, plain) over the budget: {over}"

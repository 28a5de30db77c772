"""The error budget of a layer in chunks: in bf16 no gradient is further from fp64 than the plain layer's."""

import copy
import functools
import math

import pytest
import torch
from error_budget import EPS, FACTOR, relative_errors
from tiny import tiny_settings
from tiny_models import build
from transformers import Qwen3Config, Qwen3ForCausalLM

from mst_ds import apply_settings

LENGTH, HIDDEN = 256, 64
# Luck in the rounding of a short bias is more than 5% of its error; of 128 numbers and more, so often drawn, it is not.
DRAWS = 3


@functools.cache
def one_layer():
    """Norms, of heads too, and every bias that a layer has; without the last norm, which is not in it."""
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "head_dim": 32,
        "num_key_value_heads": 4,
    }
    model = build(Qwen3Config, Qwen3ForCausalLM, **sizes, max_position_embeddings=LENGTH, attention_bias=True)
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
def draws():
    """Inputs, incoming gradients with a mean, so that sums over tokens do not cancel, and what fp64 makes of them."""
    torch.manual_seed(1)
    truth = copy.deepcopy(one_layer()).double()
    made = []
    for _ in range(DRAWS):
        x, grad_output = torch.randn(1, LENGTH, HIDDEN).bfloat16(), (torch.randn(1, LENGTH, HIDDEN) + 0.3).bfloat16()
        made.append((x, grad_output, output_and_gradients(truth, x.double(), grad_output.double())))
    return made


def errors(model):
    """By name, over all draws."""
    found = [relative_errors(output_and_gradients(model, x, dy), truth) for x, dy, truth in draws()]
    return {name: math.sqrt(sum(each[name] ** 2 for each in found) / DRAWS) for name in found[0]}


@functools.cache
def errors_of_the_plain_layer():
    return errors(copy.deepcopy(one_layer()))


@pytest.mark.parametrize("layer_chunks", [4, 64])
def test_error_budget_of_every_parameter(layer_chunks):
    settings = tiny_settings(layer_chunks=layer_chunks, mlp_chunks=1, keep_attention=True)
    found = errors(apply_settings(copy.deepcopy(one_layer()), settings))
    reference = errors_of_the_plain_layer()
    assert len(found) == 2 + 2 + 2 + 4 + 4 + 3
    # Not `>`: a NaN must be over the budget.
    over = {
        name: (error, reference[name]) for name, error in found.items() if not error <= reference[name] * FACTOR + EPS
    }
    assert not over, f"errors (chunks, plain) over the budget: {over}"

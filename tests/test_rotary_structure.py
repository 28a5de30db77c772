"""Rotary embeddings are found by what they compute, and only this instance computes them by our operator."""

import copy

import pytest
import torch
from plain_model import assert_close, loss_and_gradients, make_batch
from tiny import tiny_settings
from tiny_models import tiny_model
from torch.overrides import TorchFunctionMode

from mst_ds import apply_settings, remove_plan
from mst_ds.structure import find_rotary

ROTATE_HALVES = ["llama", "qwen3", "gemma2", "phi3"]
# Pairs in place of halves; halves one by one; angles in fp32 and the result in the model's dtype; no rotary embedding.
OTHERS = ["cohere", "gpt-oss", "olmo2", "gpt2"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ROTATE_HALVES)
def test_halves_are_found(name, device):
    model = tiny_model(name).to(device)
    assert {type(rotary.module) for rotary in find_rotary(model)} == {type(model.model.layers[0].self_attn)}
    assert len(find_rotary(model)) == len(model.model.layers)


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_not(name):
    assert find_rotary(tiny_model(name)) == []


class _Concatenations(TorchFunctionMode):
    """Counts what rotate_half and nothing else in these models does."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.cat and args[0][0].dim() == 4
        return func(*args, **(kwargs or {}))


def concatenations(model, batch):
    with _Concatenations() as found, torch.no_grad():
        model(**batch)
    return found.count


@pytest.mark.parametrize("name", ROTATE_HALVES)
def test_only_the_patched_instance_does_without_copies(name):
    model = tiny_model(name)
    other, batch = copy.deepcopy(model), make_batch()
    before = concatenations(model, batch)
    assert before > 0
    apply_settings(model, tiny_settings())
    assert concatenations(model, batch) == 0
    assert concatenations(copy.deepcopy(model), batch) == 0
    assert concatenations(other, batch) == before
    remove_plan(model)
    assert concatenations(model, batch) == before


def test_a_forward_of_the_users_own_stays():
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward
    assert attention not in [rotary.module for rotary in find_rotary(model)]


def test_a_copy_has_a_forward_of_its_own():
    model = apply_settings(tiny_model("llama"), tiny_settings())
    clone = copy.deepcopy(model)
    before = loss_and_gradients(clone, **make_batch())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_close(loss_and_gradients(clone, **make_batch()), before, tolerance=0.0)


def test_angles_of_other_tokens_do_not_fit():
    model = apply_settings(tiny_model("llama"), tiny_settings()).float()
    attention = model.model.layers[0].self_attn
    width = attention.head_dim
    for angles in (torch.randn(1, 16, width), torch.randn(1, 4, width), torch.randn(3, 8, width)):
        with pytest.raises(RuntimeError, match="must match the size of tensor"):
            attention(torch.randn(2, 8, model.config.hidden_size), (angles, angles), None)

"""Random numbers and autocast in models whose layers are computed again, chunk by chunk: those of the forward."""

import functools

import pytest
import torch
from adapted import ATTENTION, MLP, adapted
from streamed_models import BATCH, KEPT, NO_RECOMPUTE, patched
from tiny_models import build, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mst_ds.preflight.float64 import Float64, default_float64


def gpt2_with_dropout():
    dropout = {"resid_pdrop": 0.2, "attn_pdrop": 0.3, "embd_pdrop": 0.1}
    return build(GPT2Config, GPT2LMHeadModel, n_inner=48, **dropout)


def llama_with_dropout():
    return build(LlamaConfig, LlamaForCausalLM, num_key_value_heads=2, attention_dropout=0.3)


def lora_with_dropout():
    return adapted("llama", {"target_modules": ATTENTION + MLP, "lora_dropout": 0.3})


MAKE = pytest.mark.parametrize("make", [gpt2_with_dropout, llama_with_dropout, lora_with_dropout])


def seeded_step(model, autocast=False):
    """A step, and the random numbers that come after its forward and after its backward."""
    torch.manual_seed(7)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**BATCH).loss
    after = [torch.rand(())]
    loss.backward()
    after.append(torch.rand(()))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), "after": torch.stack(after), **gradients}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, different


@pytest.mark.parametrize("settings", KEPT)
@MAKE
def test_in_one_chunk_numbers_and_gradients_are_those_without_recompute(make, settings):
    expected = seeded_step(patched(make(), **NO_RECOMPUTE))
    assert_equal(seeded_step(patched(make(), **settings)), expected)


@MAKE
def test_in_several_chunks_what_is_kept_changes_the_order_of_sums_at_most(make):
    again, again_offloaded, kept, kept_offloaded = (
        seeded_step(patched(make(), layer_chunks=4, **settings.values[0])) for settings in KEPT
    )
    # Where it lies changes nothing.
    assert_equal(again_offloaded, again)
    assert_equal(kept_offloaded, kept)
    for name, value in again.items():
        assert (kept[name] - value).norm() <= 1e-14 * value.norm(), name


def slope(model, directions, step):
    """Of the loss along `directions`, with the same random numbers at every point."""
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in directions:
                parameter.add_(direction, alpha=sign * step)
            torch.manual_seed(7)
            losses.append(model(**BATCH).loss)
            for parameter, direction in directions:
                parameter.sub_(direction, alpha=sign * step)
    return (losses[0] - losses[1]) / (2 * step)


@pytest.mark.parametrize("settings", [KEPT[0], KEPT[-1]])
@MAKE
def test_in_several_chunks_gradients_are_those_of_what_the_forward_drew(make, settings):
    """By differences of its losses: another dropout in the backward would show at once."""
    with default_float64(), Float64():
        model = patched(make(), layer_chunks=4, **settings)
        found = seeded_step(model)
        torch.manual_seed(0)
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        directions = [(name, parameter, torch.randn_like(parameter)) for name, parameter in trained]
        for part in (".0.", ".1."):  # of each layer
            along = [(parameter, each) for name, parameter, each in directions if part in name]
            actual = sum((found[name] * each).sum() for name, _, each in directions if part in name)
            # The losses, of about 5, are rounded to 1e-15, and differ by a millionth of the slope.
            assert abs(actual - slope(model, along, 1e-6)) <= 1e-7 * abs(actual), part


@MAKE
def test_dropout_is_at_work(make):
    # Else the tests above would see nothing.
    model = patched(make(), layer_chunks=4)
    dropped = seeded_step(model)
    assert seeded_step(model.eval())["loss"] != dropped["loss"]
    assert seeded_step(model.train())["loss"] == dropped["loss"]


@pytest.mark.parametrize("settings", KEPT)
@pytest.mark.parametrize("make", [gpt2_with_dropout, llama_with_dropout, functools.partial(tiny_model, "olmo2")])
def test_autocast_is_that_of_the_forward(make, settings):
    """Where a weight's gradient goes through autocast's copy, it is rounded to its 16 bits; of a streamed layer not."""
    expected = seeded_step(patched(make().float(), **NO_RECOMPUTE), autocast=True)
    found = seeded_step(patched(make().float(), **settings), autocast=True)
    for name in ("loss", "after"):
        assert torch.equal(found[name], expected[name])
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= 2**-7 * value.norm(), name
    several = [seeded_step(patched(make().float(), layer_chunks=4, **each), autocast=True) for each in (settings, {})]
    assert_equal(*several)

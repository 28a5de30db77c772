"""Logits of a patched model: with a loss where they are asked for, and an error that names the plan where not."""

import copy
import warnings

import numpy as np
import pytest
import torch
from plain_model import TOLERANCE, make_batch
from tiny import tiny_settings
from tiny_models import tiny_model

import mst_ds.patching.logits
from mst_ds import apply_settings
from mst_ds.preflight.float64 import Float64

LENGTH = 30


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_logits_on_request_are_the_plain_models(name):
    """Gemma's have a softcap, Cohere's a scale."""
    plain, patched, batch = tiny_model(name), apply_settings(tiny_model(name), tiny_settings()), make_batch(LENGTH)
    expected = plain(**batch)
    for asked, tokens in (
        ({"skip_logits": False}, slice(None)),
        ({"skip_logits": False, "logits_to_keep": 0}, slice(None)),
        ({"logits_to_keep": 3}, slice(-3, None)),
        ({"logits_to_keep": torch.tensor([0, 5])}, [0, 5]),
    ):
        output = patched(**batch, **asked)
        assert abs(output.loss / expected.loss - 1) <= TOLERANCE
        torch.testing.assert_close(output.logits, expected.logits[:, tokens], rtol=TOLERANCE, atol=TOLERANCE)
    grads = []
    for model, asked in ((patched, {"skip_logits": False}), (plain, {})):
        with Float64():
            logits = model(**batch, **asked).logits
            grads += torch.autograd.grad(logits.square().sum(), model.get_output_embeddings().weight)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "use",
    [
        lambda logits: logits.shape,
        lambda logits: logits[..., :-1, :],
        lambda logits: 2 * logits,
        lambda logits: torch.argmax(logits, dim=-1),
        lambda logits: torch.nn.functional.cross_entropy(logits, None),
        lambda logits: np.argmax(logits, axis=-1),
    ],
    ids=["shape", "index", "product", "argmax", "loss", "numpy"],
)
@pytest.mark.parametrize("asked", [{}, {"skip_logits": True}], ids=["unasked", "skipped"])
def test_logits_that_were_left_out_say_so(use, asked):
    output = apply_settings(tiny_model("llama"), tiny_settings())(**make_batch(), **asked)
    with pytest.raises(ValueError, match=r"a plan of mst_ds computes its loss in chunks .* pass skip_logits=False"):
        use(output.logits)


def test_logits_that_were_left_out_may_be_handed_around():
    with torch.no_grad():
        output = apply_settings(tiny_model("llama"), tiny_settings())(**make_batch())
    # As accelerate asks of every value of an output.
    assert not hasattr(output.logits, "dtype")
    assert type(copy.deepcopy(output)["logits"]) is type(output.logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None, "skip_logits": True}, "skip_logits is true, and there are no labels"),
        ({"logits_to_keep": torch.ones(2, 29, dtype=torch.bool)}, r"must be a number or \(tokens,\); got \(2, 29\)"),
    ],
    ids=["no-labels", "mask"],
)
def test_requests_that_cannot_be_met(arguments, message):
    with pytest.raises(ValueError, match=message):
        apply_settings(tiny_model("llama"), tiny_settings())(**{**make_batch(), **arguments})


def test_large_logits_in_training_are_warned_of(monkeypatch):
    """As label smoothing, which takes the labels out, makes them."""
    monkeypatch.setattr(mst_ds.patching.logits, "_WORTH_A_WARNING", 2 * 29 * 97 * 8)
    model, batch = apply_settings(tiny_model("llama"), tiny_settings()), make_batch()
    with pytest.warns(UserWarning, match=r"without labels a model with a plan of mst_ds builds its logits whole"):
        model(batch["input_ids"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
        model(batch["input_ids"], logits_to_keep=1)
        model.eval()(batch["input_ids"])
        model.train()(batch["input_ids"][:, 1:])

"""Scaled and softcapped logits in the chunked loss."""

import functools

import pytest
import torch
from error_budget import (
    assert_equal_but_for_order,
    assert_within_budget,
    gradients,
    leaves,
    value_and_gradients,
)
from plain_loss import ONE, make_labels, make_tensors, our_loss, plain_loss
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence import chunked_loss_of_head

MIB = 2**20
# Granite divides by 8, Cohere multiplies by 1/16, Gemma 2 caps at 30. The logits' spread is 2, so a cap of 3 shows.
TRANSFORMS = {
    "scale": {"logit_scale": 0.125},
    "softcap": {"logit_softcap": 3.0},
    "both": {"logit_scale": 2.5, "logit_softcap": 5.0},
}


def our_loss_of_head(chunks, labels, tensors, **kwargs):
    def head(x):
        return torch.nn.functional.linear(x, tensors["weight"], tensors.get("bias"))

    parameters = [tensors[name] for name in ("weight", "bias") if name in tensors]
    return chunked_loss_of_head(head, tensors["x"], parameters, labels, chunks=chunks, **kwargs)


@functools.cache
def truth_and_reference(dtype, name):
    shape = (3, 1021)
    tensors, labels = make_tensors(dtype, shape), make_labels(shape)
    plain = functools.partial(plain_loss, labels, **TRANSFORMS[name])
    truth = value_and_gradients(plain, tensors, torch.float64, ONE)
    return tensors, labels, truth, value_and_gradients(plain, tensors, dtype, ONE)


@pytest.mark.parametrize("chunks", [4, 256])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_budget(dtype, name, chunks):
    """The reference computes scale, cap and loss in fp32; transformers' models round the capped logits to 16 bits."""
    tensors, labels, truth, reference = truth_and_reference(dtype, name)
    ours = functools.partial(our_loss, chunks, labels, **TRANSFORMS[name])
    candidate = value_and_gradients(ours, tensors, dtype, ONE)
    assert_within_budget(candidate, reference, truth)


@pytest.mark.parametrize("spread", [1.0, 100.0, 1e4], ids=["small", "large", "huge"])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("loss", [our_loss, our_loss_of_head])
def test_values_and_every_gradient(loss, name, spread):
    """Up to logits at which a tanh is flat: the gradient there is 0, and not NaN."""
    tensors, labels = make_tensors(torch.float64, (2, 37)), make_labels((2, 37))
    tensors["x"] *= spread
    plain, ours = (
        value_and_gradients(functools.partial(f, labels, **TRANSFORMS[name]), tensors, torch.float64, ONE)
        for f in (plain_loss, functools.partial(loss, 5))
    )
    assert all(value.isfinite().all() for value in ours.values())
    # 1 - tanh^2 of a tanh near 1 has few digits left, in plain torch as well: hence an absolute tolerance.
    assert_equal_but_for_order(ours, plain, atol=1e-13)


@pytest.mark.parametrize("frozen", [{"x"}, {"weight", "bias"}, {"x", "weight"}], ids=["body", "head", "all-but-bias"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(name, frozen):
    tensors, labels = make_tensors(torch.float64, (2, 19)), make_labels((2, 19))
    plain, ours = leaves(tensors, frozen=frozen), leaves(tensors, frozen=frozen)
    plain_loss(labels, plain, **TRANSFORMS[name]).backward()
    our_loss(4, labels, ours, **TRANSFORMS[name]).backward()
    assert {name for name in ours if ours[name].grad is None} == frozen
    trained = tensors.keys() - frozen
    assert_equal_but_for_order(
        {name: ours[name].grad for name in trained}, {name: plain[name].grad for name in trained}, atol=1e-14
    )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_loss_is_the_same_with_and_without_gradients(name):
    tensors, labels = leaves(make_tensors(torch.bfloat16, (3, 37))), make_labels((3, 37))
    with torch.no_grad():
        without = our_loss(4, labels, tensors, **TRANSFORMS[name])
    assert not without.requires_grad
    assert torch.equal(our_loss(4, labels, tensors, **TRANSFORMS[name]), without)


def test_the_incoming_gradient_and_num_items_scale_everything():
    tensors, labels = make_tensors(torch.float64, (2, 19)), make_labels((2, 19))
    settings = {**TRANSFORMS["both"], "num_items_in_batch": 100}
    plain, ours = leaves(tensors), leaves(tensors)
    (3 * plain_loss(labels, plain, **settings)).backward()
    (3 * our_loss(4, labels, ours, **settings)).backward()
    assert_equal_but_for_order(gradients(ours), gradients(plain), atol=1e-14)


def peaks(**transform):
    """Peak live bytes of forward and backward, and of a forward without gradients: 16 chunks of 256 x 32000 logits."""
    with FakeTensorMode(), LiveMemory() as memory:
        tensors = leaves({"x": torch.ones(4096, 256), "weight": torch.ones(32000, 256)})
        labels = torch.zeros(4096, dtype=torch.long)
        memory.reset_peak()
        loss = our_loss(16, labels, tensors, **transform)
        forward = memory.peak
        memory.reset_peak()
        loss.backward()
        backward = memory.peak
        del loss
        for tensor in tensors.values():
            tensor.grad = None
        memory.reset_peak()
        with torch.no_grad():
            our_loss(16, labels, tensors, **transform)
    return forward, backward, memory.peak


def test_a_softcap_costs_one_more_tensor_of_a_chunks_logits_and_a_scale_none():
    plain, scaled, capped = peaks(), peaks(logit_scale=2.0), peaks(logit_softcap=30.0)
    assert scaled == plain
    chunk = 256 * 32000 * 4
    # Its derivative, by which the gradient of the logits is multiplied; the loss's own temporaries are a few columns.
    assert capped[0] - plain[0] <= chunk
    assert capped[1:] == plain[1:]

"""The log-probabilities of labels, in chunks, against a log-softmax over all logits at once."""

import functools

import pytest
import torch
import torch.nn.functional as F
from count_products import CountProducts
from error_budget import (
    assert_equal_but_for_order,
    assert_within_budget,
    gradients,
    leaves,
    value_and_gradients,
)
from plain_loss import HIDDEN, VOCAB, make_labels, make_tensors, our_loss, plain_log_probs
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds import chunked_log_probs
from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence import chunked_log_probs_of_head, chunked_loss_of_head

SHAPE, LONG = (2, 37), (3, 1021)
TRANSFORMS = {
    "plain": {},
    "scale": {"logit_scale": 0.125},
    "temperature": {"logit_scale": 2.5, "temperature": 0.7},
    "softcap": {"logit_scale": 2.5, "logit_softcap": 5.0, "temperature": 0.7},
}

assert_same = functools.partial(assert_equal_but_for_order, atol=1e-13)


def of_weight(chunks, labels, tensors, **kwargs):
    return chunked_log_probs(tensors["x"], tensors["weight"], labels, chunks=chunks, bias=tensors.get("bias"), **kwargs)


def of_head(chunks, labels, tensors, **kwargs):
    parameters = [tensors[name] for name in ("weight", "bias") if name in tensors]
    return chunked_log_probs_of_head(
        lambda x: F.linear(x, *parameters), tensors["x"], parameters, labels, chunks=chunks, **kwargs
    )


def incoming(shape):
    """A gradient for each token, of either sign and of different sizes, as those of preferences are."""
    torch.manual_seed(2)
    return torch.randn(shape, dtype=torch.float64) * torch.logspace(-3, 1, shape[-1], dtype=torch.float64)


@pytest.mark.parametrize("chunks", [1, 4, 7])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("ours", [of_weight, of_head])
def test_values_and_every_gradient(ours, name, chunks):
    tensors, labels = make_tensors(torch.float64, SHAPE), make_labels(SHAPE)
    plain, candidate = (
        value_and_gradients(
            functools.partial(function, labels, **TRANSFORMS[name]), tensors, torch.float64, incoming(SHAPE)
        )
        for function in (plain_log_probs, functools.partial(ours, chunks))
    )
    assert_same(candidate, plain)
    ignored = candidate["output"][labels == -100]
    assert ignored.numel()
    assert not ignored.signbit().any()


def test_without_a_bias_and_with_an_ignore_index_of_ones_own():
    tensors, labels = make_tensors(torch.float64, SHAPE, bias=False), make_labels(SHAPE)
    labels[labels == -100] = 7
    plain, ours = (
        value_and_gradients(
            functools.partial(function, labels, ignore_index=7), tensors, torch.float64, incoming(SHAPE)
        )
        for function in (plain_log_probs, functools.partial(of_weight, 3))
    )
    assert_same(ours, plain)


@functools.cache
def truth_and_reference(dtype):
    tensors, labels = make_tensors(dtype, LONG), make_labels(LONG)
    plain = functools.partial(plain_log_probs, labels)
    truth = value_and_gradients(plain, tensors, torch.float64, incoming(LONG))
    return tensors, labels, truth, value_and_gradients(plain, tensors, dtype, incoming(LONG))


@pytest.mark.parametrize("chunks", [4, 256])
@pytest.mark.parametrize("ours", [of_weight, of_head])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_budget(dtype, ours, chunks):
    tensors, labels, truth, reference = truth_and_reference(dtype)
    candidate = value_and_gradients(functools.partial(ours, chunks, labels), tensors, dtype, incoming(LONG))
    assert_within_budget(candidate, reference, truth)
    assert candidate["output"].dtype == torch.float32
    assert all(candidate[name].dtype == dtype for name in tensors)


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize("ours", [of_weight, of_head])
def test_autocast(ours, backward_inside):
    """The backward runs the head again, under the forward's autocast and not under its own."""
    shape = (2, 507)
    tensors, labels = make_tensors(torch.float32, shape), make_labels(shape)
    truth = value_and_gradients(functools.partial(plain_log_probs, labels), tensors, torch.float64, incoming(shape))
    results = []
    for function in (plain_log_probs, functools.partial(ours, 16)):
        own = leaves(tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = function(labels, own)
            if backward_inside:
                value.backward(incoming(shape).float())
        if not backward_inside:
            value.backward(incoming(shape).float())
        assert value.dtype == torch.float32
        assert all(grad.dtype == torch.float32 for grad in gradients(own).values())
        results.append({"output": value.detach(), **gradients(own)})
    assert_within_budget(results[1], results[0], truth)


def test_the_backward_draws_the_random_numbers_of_the_forward():
    tensors, labels = leaves(make_tensors(torch.float64, SHAPE, bias=False)), make_labels(SHAPE)
    grad, rows = incoming(SHAPE), [slice(0, 19), slice(19, 37), slice(37, 56), slice(56, 74)]

    def head(x):
        return F.linear(F.dropout(x, 0.5), tensors["weight"])

    def in_chunks():
        logits = torch.cat([head(tensors["x"].flatten(0, 1)[part]) for part in rows])
        return plain_log_probs(labels, {"x": logits.view(*SHAPE, -1), "weight": torch.eye(VOCAB, dtype=logits.dtype)})

    def ours():
        return chunked_log_probs_of_head(head, tensors["x"], [tensors["weight"]], labels, chunks=4)

    results, states = [], []
    for function in (in_chunks, ours):
        torch.manual_seed(7)
        value = function()
        torch.rand(3)  # what is drawn in between
        grads = torch.autograd.grad(value, list(tensors.values()), grad)
        results.append(dict(zip(("output", *tensors), (value.detach(), *grads), strict=True)))
        states.append(torch.get_rng_state())
    assert_same(results[1], results[0])
    assert torch.equal(*states)


@pytest.mark.parametrize("frozen", [{"x"}, {"weight", "bias"}, {"x", "weight"}], ids=["body", "head", "all-but-bias"])
@pytest.mark.parametrize("ours", [of_weight, of_head])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(ours, frozen):
    tensors, labels = make_tensors(torch.float64, SHAPE), make_labels(SHAPE)
    plain, own = leaves(tensors, frozen=frozen), leaves(tensors, frozen=frozen)
    plain_log_probs(labels, plain).backward(incoming(SHAPE))
    ours(4, labels, own).backward(incoming(SHAPE))
    assert {name for name in own if own[name].grad is None} == frozen
    trained = tensors.keys() - frozen
    assert_same({name: own[name].grad for name in trained}, {name: plain[name].grad for name in trained})


def test_the_incoming_gradient_of_an_ignored_token_counts_nothing():
    """A mean over a token's own count may divide 0 by 0 there."""
    tensors, labels = leaves(make_tensors(torch.float32, SHAPE)), make_labels(SHAPE)
    grad = incoming(SHAPE).float().masked_fill(labels == -100, torch.nan)
    of_weight(4, labels, tensors).backward(grad)
    assert all(each.isfinite().all() for each in gradients(tensors).values())


def test_an_expanded_gradient_and_hidden_states_that_are_not_contiguous():
    tensors, labels = make_tensors(torch.float64, SHAPE), make_labels(SHAPE)
    x = tensors["x"].transpose(0, 1).contiguous().requires_grad_()
    chunked_log_probs(x.transpose(0, 1), tensors["weight"], labels, chunks=4, bias=tensors["bias"]).sum().backward()
    plain = leaves(tensors)
    plain_log_probs(labels, plain).sum().backward()
    assert_same({"x": x.grad.transpose(0, 1)}, {"x": plain["x"].grad})


def test_a_second_backward_through_a_retained_graph_gives_the_same():
    tensors, labels = leaves(make_tensors(torch.bfloat16, SHAPE)), make_labels(SHAPE)
    value, grad = of_weight(4, labels, tensors), incoming(SHAPE).float()
    first = torch.autograd.grad(value, list(tensors.values()), grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, list(tensors.values()), grad)))


def test_a_second_derivative_is_refused_not_wrong():
    tensors = leaves(make_tensors(torch.float64, (5,)))
    (dx,) = torch.autograd.grad(of_weight(2, torch.arange(5), tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_head_that_was_changed_before_the_backward_is_an_error():
    """The backward would compute other logits than the forward."""
    tensors, labels = leaves(make_tensors(torch.float64, SHAPE)), make_labels(SHAPE)
    value = of_weight(4, labels, tensors)
    with torch.no_grad():
        tensors["weight"] *= 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


@pytest.mark.parametrize("ours", [of_weight, of_head])
def test_under_no_grad_there_are_log_probs_and_nothing_else(ours):
    tensors, labels = leaves(make_tensors(torch.float32, SHAPE)), make_labels(SHAPE)
    expected = ours(4, labels, tensors).detach()
    with torch.no_grad(), LiveMemory() as memory:
        value = ours(4, labels, tensors)
        assert memory.live == value.nbytes
    assert torch.equal(value, expected)
    assert not value.requires_grad


@pytest.mark.parametrize(
    ("frozen", "products"),
    [
        ((), {(8, HIDDEN): 1, (VOCAB, HIDDEN): 1}),
        (("weight",), {(8, HIDDEN): 1}),
        (("x",), {(VOCAB, HIDDEN): 1}),
    ],
    ids=["all", "frozen-head", "frozen-body"],
)
def test_logits_are_computed_twice_and_only_gradients_that_are_needed(frozen, products):
    tensors = leaves(make_tensors(torch.float32, (32,), bias=False), frozen=frozen)
    with CountProducts() as forward:
        value = of_weight(4, torch.arange(32), tensors)
    with CountProducts() as backward:
        value.sum().backward()
    assert forward.shapes == {(8, VOCAB): 4}
    assert backward.shapes == {(8, VOCAB): 4} | {shape: 4 * count for shape, count in products.items()}


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
        of_weight(2, torch.arange(3), make_tensors(torch.float32, (3,)), temperature=temperature)


@pytest.mark.parametrize("ours", [of_weight, of_head])
def test_a_head_that_zero3_has_not_gathered_is_refused(ours):
    tensors = make_tensors(torch.float32, (3,)) | {"weight": torch.empty(0)}
    with pytest.raises(ValueError, match="has no elements: ZeRO-3 has not gathered it"):
        ours(2, torch.arange(3), tensors)


def loss_of_head(chunks, labels, tensors):
    parameters = [tensors["weight"]]
    return chunked_loss_of_head(lambda x: F.linear(x, *parameters), tensors["x"], parameters, labels, chunks=chunks)


def peaks(function, tokens, chunks, dtype):
    """Peak live bytes of forward and backward together, and what is held between them."""
    with FakeTensorMode(), LiveMemory() as memory:
        tensors = leaves({"x": torch.ones(tokens, 64, dtype=dtype), "weight": torch.ones(8000, 64, dtype=dtype)})
        labels = torch.zeros(tokens, dtype=torch.long)
        before = memory.live
        memory.reset_peak()
        value = function(chunks, labels, tensors)
        held = memory.live - before
        value.sum().backward()
        return memory.peak - before, held


@pytest.mark.parametrize(("ours", "loss"), [(of_weight, our_loss), (of_head, loss_of_head)], ids=["weight", "head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_peak_memory_is_that_of_the_loss_and_flat_in_the_length(ours, loss, dtype):
    peak, held = peaks(ours, 1024, 8, dtype)
    twice, _ = peaks(ours, 2048, 16, dtype)
    of_loss, _ = peaks(loss, 1024, 8, dtype)
    print(f"MiB: {peak / 2**20:.2f}, held {held / 2**20:.2f}; of the loss {of_loss / 2**20:.2f}")
    # Full: 31.25 MiB of logits in fp32 and as much for each of their gradients; a chunk's are 3.9.
    assert peak <= 1.1 * of_loss
    # The gradient of the hidden states, and a few numbers of each token.
    per_token = 64 * dtype.itemsize + 32
    assert twice - peak <= 1024 * per_token
    # Between forward and backward nothing but the log-probabilities.
    assert held <= 1024 * 4 + 1024

"""The chunked MLP against plain torch."""

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
    relative_error,
    value_and_gradients,
)
from plain_mlp import HIDDEN, INTERMEDIATE, make_tensors, our_mlp, plain_mlp
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds.memory.live import LiveMemory

MIB = 2**20


assert_same = functools.partial(assert_equal_but_for_order, atol=1e-12)


@functools.cache
def truth_and_reference(dtype, gate, bias):
    tensors = make_tensors(dtype, (3, 1021), gate=gate, bias=bias)
    grad_output = torch.randn_like(tensors["x"])
    truth = value_and_gradients(plain_mlp, tensors, torch.float64, grad_output)
    reference = value_and_gradients(plain_mlp, tensors, dtype, grad_output)
    return tensors, grad_output, truth, reference


@pytest.mark.parametrize("chunks", [4, 256])
@pytest.mark.parametrize(
    ("gate", "bias"), [(True, True), (True, False), (False, True)], ids=["gate-bias", "gate", "bias"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_budget(dtype, gate, bias, chunks):
    tensors, grad_output, truth, reference = truth_and_reference(dtype, gate, bias)
    candidate = value_and_gradients(functools.partial(our_mlp, chunks), tensors, dtype, grad_output)
    assert_within_budget(candidate, reference, truth)
    assert all(candidate[name].dtype == dtype for name in candidate)


def test_bf16_error_does_not_grow_with_the_number_of_chunks():
    tensors, grad_output, truth, _ = truth_and_reference(torch.bfloat16, True, True)
    errors = {}
    for chunks in (1, 512):
        candidate = value_and_gradients(functools.partial(our_mlp, chunks), tensors, torch.bfloat16, grad_output)
        errors[chunks] = {name: relative_error(candidate[name], truth[name]) for name in truth}
    # One rounding to bf16 at the end is the whole difference; sums kept in bf16 grow it five times and more.
    assert all(errors[512][name] <= 1.01 * errors[1][name] for name in truth), errors


@pytest.mark.parametrize(
    "activation", [F.gelu, functools.partial(F.gelu, approximate="tanh"), F.relu, torch.tanh, torch.nn.Identity()]
)
@pytest.mark.parametrize("gate", [True, False])
def test_activations(activation, gate):
    tensors = make_tensors(torch.float64, (2, 37), gate=gate, hidden=16, intermediate=40)
    grad_output = torch.randn_like(tensors["x"])
    plain, ours = (
        value_and_gradients(functools.partial(mlp, activation=activation), tensors, torch.float64, grad_output)
        for mlp in (plain_mlp, functools.partial(our_mlp, 5))
    )
    assert_same(ours, plain)


@pytest.mark.parametrize(("tokens", "chunks"), [(9, 4), (101, 7), (13, 64), (1, 3), (3, 1)])
def test_every_token_counts_at_uneven_tails(tokens, chunks):
    """A lost or doubled token shows in its own row, in every row's share of the weights, and in the output."""
    tensors = make_tensors(torch.float64, (tokens,), hidden=16, intermediate=40)
    grad_output = torch.randn_like(tensors["x"])
    plain, ours = (
        value_and_gradients(mlp, tensors, torch.float64, grad_output)
        for mlp in (plain_mlp, functools.partial(our_mlp, chunks))
    )
    assert_same(ours, plain)


def test_no_tokens():
    tensors = leaves(make_tensors(torch.float64, (2, 0)))
    out = our_mlp(4, tensors)
    out.sum().backward()
    assert out.shape == (2, 0, HIDDEN)
    assert not any(grad.any() for grad in gradients(tensors).values())


def test_an_output_width_of_its_own():
    tensors = make_tensors(torch.float64, (2, 9), hidden=16, intermediate=40, bias=False)
    tensors["down"] = torch.randn(24, 40, dtype=torch.float64)
    grad_output = torch.randn(2, 9, 24, dtype=torch.float64)
    plain = value_and_gradients(plain_mlp, tensors, torch.float64, grad_output)
    assert_same(value_and_gradients(functools.partial(our_mlp, 2), tensors, torch.float64, grad_output), plain)


def test_a_transposed_input_and_an_expanded_incoming_gradient():
    tensors = make_tensors(torch.float64, (9, 2), hidden=16, intermediate=40)
    results = []
    for mlp in (plain_mlp, functools.partial(our_mlp, 3)):
        own = leaves(tensors)
        mlp({**own, "x": own["x"].transpose(0, 1)}).sum().backward()
        results.append(gradients(own))
    assert_same(results[1], results[0])


def test_gradients_accumulate_over_backwards_of_different_scale():
    tensors = make_tensors(torch.float64, (2, 19), hidden=16, intermediate=40)
    plain, ours = leaves(tensors), leaves(tensors)
    for scale in (3.0, -0.5):
        (scale * plain_mlp(plain).square().sum()).backward()
        (scale * our_mlp(4, ours).square().sum()).backward()
    assert_same(gradients(ours), gradients(plain))


def test_a_second_backward_through_a_retained_graph_gives_the_same():
    tensors = leaves(make_tensors(torch.float32, (2, 37)))
    loss = our_mlp(4, tensors).square().mean()
    first = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(tensors.values()))
    assert all(map(torch.equal, first, second))


def test_a_second_derivative_is_refused_not_wrong():
    tensors = leaves(make_tensors(torch.float64, (5,)))
    (dx,) = torch.autograd.grad(our_mlp(2, tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize(
    "frozen",
    [
        {"x"},
        {"x", "gate", "up", "gate_bias", "up_bias"},
        {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"},
        {"down", "up_bias"},
    ],
    ids=["input", "all-but-down", "weights", "some"],
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(frozen):
    tensors = make_tensors(torch.float64, (2, 19), hidden=16, intermediate=40)
    plain, ours = leaves(tensors, frozen=frozen), leaves(tensors, frozen=frozen)
    plain_mlp(plain).square().sum().backward()
    our_mlp(4, ours).square().sum().backward()
    assert {name for name in ours if ours[name].grad is None} == frozen
    trained = tensors.keys() - frozen
    assert_same({name: ours[name].grad for name in trained}, {name: plain[name].grad for name in trained})


@pytest.mark.parametrize(
    ("frozen", "products"),
    [
        # Of a chunk: gate, up and down's input gradient; two input gradients; three weight gradients.
        ((), {(8, INTERMEDIATE): 3, (8, HIDDEN): 2, (INTERMEDIATE, HIDDEN): 2, (HIDDEN, INTERMEDIATE): 1}),
        (("x",), {(8, INTERMEDIATE): 3, (INTERMEDIATE, HIDDEN): 2, (HIDDEN, INTERMEDIATE): 1}),
        (("gate", "up", "down"), {(8, INTERMEDIATE): 3, (8, HIDDEN): 2}),
    ],
    ids=["all", "frozen-input", "frozen-weights"],
)
def test_the_backward_computes_only_what_is_needed_and_never_the_output(frozen, products):
    tensors = leaves(make_tensors(torch.float32, (32,), bias=False), frozen=frozen)
    out = our_mlp(4, tensors)
    with CountProducts() as counted:
        out.backward(torch.ones_like(out))
    assert counted.shapes == {shape: 4 * count for shape, count in products.items()}


def test_nothing_is_left_behind_by_a_forward_alone():
    tensors = leaves(make_tensors(torch.float32, (32,), bias=False))
    with CountProducts() as counted:
        our_mlp(4, tensors)
    assert counted.shapes == {(8, INTERMEDIATE): 8, (8, HIDDEN): 4}
    with torch.no_grad():
        assert not our_mlp(4, tensors).requires_grad
    assert not any(grad is not None for grad in gradients(tensors).values())


def test_the_output_is_the_same_with_and_without_gradients():
    tensors = leaves(make_tensors(torch.bfloat16, (3, 37)))
    with torch.no_grad():
        without = our_mlp(4, tensors)
    assert torch.equal(our_mlp(4, tensors), without)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside):
    tensors = make_tensors(torch.float32, (2, 507))
    grad_output = torch.randn_like(tensors["x"])
    truth = value_and_gradients(plain_mlp, tensors, torch.float64, grad_output)
    results = []
    for mlp in (plain_mlp, functools.partial(our_mlp, 16)):
        own = leaves(tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = mlp(own)
            if backward_inside:
                out.backward(grad_output.to(out.dtype))
        if not backward_inside:
            out.backward(grad_output.to(out.dtype))
        assert out.dtype == torch.bfloat16
        assert all(grad.dtype == torch.float32 for grad in gradients(own).values())
        results.append({"output": out.detach(), **gradients(own)})
    assert_within_budget(results[1], results[0], truth)


def test_autocast_around_the_backward_alone_changes_nothing():
    tensors, results = make_tensors(torch.float32, (2, 37)), []
    for enabled in (False, True):
        own = leaves(tensors)
        loss = our_mlp(4, own).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        results.append(gradients(own))
    assert all(torch.equal(results[0][name], results[1][name]) for name in tensors)


@pytest.mark.parametrize("chunks", [0, -2])
def test_less_than_one_chunk_is_refused(chunks):
    with pytest.raises(ValueError, match=f"chunks must be at least 1, got {chunks}"):
        our_mlp(chunks, make_tensors(torch.float32, (3,)))


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_a_weight_that_zero3_has_not_gathered_is_refused(name):
    tensors = make_tensors(torch.float32, (3,)) | {name: torch.empty(0)}
    with pytest.raises(ValueError, match=f"{name}_weight has no elements: ZeRO-3 has not gathered it"):
        our_mlp(2, tensors)


def measure(tokens, chunks):
    """Peak live bytes of the forward and of the backward, and what the forward holds besides its output."""
    tensors = leaves(make_tensors(torch.float32, (tokens,), bias=False, hidden=256, intermediate=1024))
    grad_output = torch.ones(tokens, 256)
    with LiveMemory() as memory:
        out = our_mlp(chunks, tensors)
        forward, held = memory.peak, memory.live - out.nbytes
        del out
        out = our_mlp(chunks, tensors)
        memory.reset_peak()
        out.backward(grad_output)
    return forward, held, memory.peak


def test_peak_memory():
    with FakeTensorMode():
        forward, held, backward = measure(4096, 16)
        twice = measure(8192, 32)
    print(f"chunked MLP, MiB: forward {forward / MIB:.2f}, held {held / MIB:.2f}, backward {backward / MIB:.2f}")
    # The output of 4 MiB and two of a chunk's tensors of 1 MiB: its gate, which becomes the product, and up. Plain: 48.
    assert forward <= 6 * MIB
    assert held == 0
    # The output and the input's gradient, three weight gradients of 1 MiB and four of a chunk's tensors. Plain: 97.
    assert backward <= 15 * MIB
    # The chunks keep their size, so only what is as long as the sequence grows: the output, and the input's gradient.
    assert twice[0] - forward == 4 * MIB
    assert twice[2] - backward == 8 * MIB


def test_peak_memory_of_real_tensors_is_that_of_fake_ones():
    with FakeTensorMode():
        fake = measure(256, 4)
    assert measure(256, 4) == fake

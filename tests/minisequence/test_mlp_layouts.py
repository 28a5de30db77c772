"""The chunked MLP with weights as other models store them, and what it saves of them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from count_products import CountProducts
from error_budget import assert_equal_but_for_order, assert_within_budget, gradients, leaves, value_and_gradients
from plain_mlp import HIDDEN, INTERMEDIATE, make_tensors, our_mlp, plain_mlp, stored

from mst_ds.memory.live import LiveMemory

assert_same = functools.partial(assert_equal_but_for_order, atol=1e-12)

NO_LAYOUT = {"gate_in_up": False, "transposed": False}
LAYOUTS = {
    "gate-in-up": {"gate_in_up": True, "transposed": False},
    "transposed": {"gate_in_up": False, "transposed": True},
    "gate-in-up-transposed": {"gate_in_up": True, "transposed": True},
}


def plain_stored_mlp(layout, tensors, activation=F.silu):
    """As Phi-3 and GPT-2 compute it: one product for gate and up."""

    def linear(x, name):
        weight, bias = tensors[name], tensors.get(f"{name}_bias")
        return F.linear(x, weight.t() if layout["transposed"] else weight, bias)

    up = linear(tensors["x"], "up")
    if layout["gate_in_up"]:
        gate, up = up.chunk(2, dim=-1)
        product = activation(gate) * up
    elif "gate" in tensors:
        product = activation(linear(tensors["x"], "gate")) * up
    else:
        product = activation(up)
    return linear(product, "down")


@functools.cache
def truth_and_reference(dtype, name, gate, bias):
    layout = LAYOUTS[name]
    tensors = stored(make_tensors(dtype, (3, 1021), gate=gate, bias=bias), **layout)
    grad_output = torch.randn_like(tensors["x"])
    plain = functools.partial(plain_stored_mlp, layout)
    truth = value_and_gradients(plain, tensors, torch.float64, grad_output)
    return tensors, grad_output, truth, value_and_gradients(plain, tensors, dtype, grad_output)


@pytest.mark.parametrize("chunks", [4, 256])
@pytest.mark.parametrize(
    ("layout", "gate", "bias"),
    [("gate-in-up", True, False), ("transposed", False, True), ("gate-in-up-transposed", True, True)],
    ids=["phi3", "gpt2", "both-bias"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_budget(dtype, layout, gate, bias, chunks):
    tensors, grad_output, truth, reference = truth_and_reference(dtype, layout, gate, bias)
    ours = functools.partial(our_mlp, chunks, **LAYOUTS[layout])
    candidate = value_and_gradients(ours, tensors, dtype, grad_output)
    assert_within_budget(candidate, reference, truth)
    assert all(candidate[name].dtype == dtype for name in candidate)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("name", "gate"), [*((name, True) for name in LAYOUTS), ("transposed", False)], ids=[*LAYOUTS, "transposed-no-gate"]
)
def test_values_and_every_gradient(name, gate, bias):
    layout = LAYOUTS[name]
    tensors = stored(make_tensors(torch.float64, (2, 37), gate=gate, bias=bias, hidden=16, intermediate=40), **layout)
    grad_output = torch.randn_like(tensors["x"])
    plain, ours = (
        value_and_gradients(mlp, tensors, torch.float64, grad_output)
        for mlp in (functools.partial(plain_stored_mlp, layout), functools.partial(our_mlp, 5, **layout))
    )
    assert_same(ours, plain)


@pytest.mark.parametrize(
    "frozen",
    [{"x"}, {"up"}, {"up", "up_bias"}, {"down"}, {"up_bias", "down_bias"}],
    ids=lambda names: "-".join(sorted(names)),
)
@pytest.mark.parametrize("name", ["gate-in-up", "gate-in-up-transposed"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(name, frozen):
    layout = LAYOUTS[name]
    tensors = stored(make_tensors(torch.float64, (2, 19), hidden=16, intermediate=40), **layout)
    plain, ours = leaves(tensors, frozen=frozen), leaves(tensors, frozen=frozen)
    plain_stored_mlp(layout, plain).square().sum().backward()
    our_mlp(4, ours, **layout).square().sum().backward()
    assert {name for name in ours if ours[name].grad is None} == frozen
    trained = tensors.keys() - frozen
    assert_same({name: ours[name].grad for name in trained}, {name: plain[name].grad for name in trained})


def test_gate_and_up_in_one_weight_cost_one_product_for_each_of_their_gradients():
    layout = LAYOUTS["gate-in-up"]
    tensors = leaves(stored(make_tensors(torch.float32, (32,), bias=False), **layout))
    out = our_mlp(4, tensors, **layout)
    with CountProducts() as counted:
        out.backward(torch.ones_like(out))
    per_chunk = {(8, INTERMEDIATE): 3, (8, HIDDEN): 1, (2 * INTERMEDIATE, HIDDEN): 1, (HIDDEN, INTERMEDIATE): 1}
    assert counted.shapes == {shape: 4 * count for shape, count in per_chunk.items()}


@pytest.mark.parametrize("layout", [{}, *LAYOUTS.values()], ids=["plain", *LAYOUTS])
def test_what_is_saved_is_the_input_and_the_parameters_themselves(layout):
    """A view would keep the storage that ZeRO-3 has gathered alive; a parameter gives it back."""
    tensors = leaves(stored(make_tensors(torch.float32, (9,), hidden=16, intermediate=40), **{**NO_LAYOUT, **layout}))
    saved = [tensor for tensor in our_mlp(2, tensors, **layout).grad_fn.saved_tensors if tensor is not None]
    assert {id(tensor) for tensor in saved} == {id(tensor) for tensor in tensors.values()}


def test_nothing_but_the_input_is_kept_for_the_backward():
    tensors = make_tensors(torch.float32, (9,), hidden=16, intermediate=40)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in tensors.items() if name != "x"}
    with LiveMemory() as memory:
        out = our_mlp(2, {"x": tensors["x"], **parameters})
        assert memory.live == out.nbytes


def test_the_output_may_be_added_to_in_place():
    """As Falcon does with its attention's output."""
    tensors, results = make_tensors(torch.float64, (2, 19), hidden=16, intermediate=40), []
    for mlp in (plain_mlp, functools.partial(our_mlp, 4)):
        own = leaves(tensors)
        out = mlp(own)
        out += own["x"]
        out.square().sum().backward()
        results.append(gradients(own))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("both", [{"gate": True, "bias": False}, {"gate": False, "bias": True}], ids=["weight", "bias"])
def test_a_gate_in_two_places_is_refused(both):
    tensors = make_tensors(torch.float32, (3,), gate=both["gate"], bias=both["bias"])
    if both["bias"]:
        tensors["gate_bias"] = torch.zeros(INTERMEDIATE)
    with pytest.raises(ValueError, match="gate_weight and gate_bias must be None"):
        our_mlp(2, tensors, gate_in_up=True)

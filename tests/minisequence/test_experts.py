"""The chunked experts against plain torch."""

import functools

import pytest
import torch
from count_products import CountProducts
from error_budget import (
    assert_equal_but_for_order,
    assert_within_budget,
    gradients,
    leaves,
    value_and_gradients,
)
from plain_experts import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    VARIANTS,
    make_index,
    make_tensors,
    our_experts,
    plain_experts,
)
from torch.utils.checkpoint import checkpoint

from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence import ParameterSums

MIB = 2**20
assert_same = functools.partial(assert_equal_but_for_order, atol=1e-12)


@functools.cache
def truth_and_reference(dtype, name):
    count = 3063
    of_tensors, settings = VARIANTS[name]
    tensors, index = make_tensors(dtype, count, **of_tensors), make_index(count)
    grad_output = torch.randn_like(tensors["x"])
    plain = functools.partial(plain_experts, index, **settings)
    truth = value_and_gradients(plain, tensors, torch.float64, grad_output)
    return tensors, index, grad_output, truth, value_and_gradients(plain, tensors, dtype, grad_output)


@pytest.mark.parametrize("chunks", [4, 256])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_budget(dtype, name, chunks):
    tensors, index, grad_output, truth, reference = truth_and_reference(dtype, name)
    ours = functools.partial(our_experts, chunks, index, **VARIANTS[name][1])
    candidate = value_and_gradients(ours, tensors, dtype, grad_output)
    assert_within_budget(candidate, reference, truth)
    assert all(candidate[name].dtype == dtype for name in candidate)


@pytest.mark.parametrize("chunks", [1, 5, 64, 10**6])
@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_every_gradient(name, chunks):
    of_tensors, settings = VARIANTS[name]
    tensors, index = make_tensors(torch.float64, 61, **of_tensors), make_index(61)
    grad_output = torch.randn_like(tensors["x"])
    plain, ours = (
        value_and_gradients(functools.partial(f, index, **settings), tensors, torch.float64, grad_output)
        for f in (plain_experts, functools.partial(our_experts, chunks))
    )
    assert_same(ours, plain)
    assert not ours["up"][EXPERTS // 2].any()  # nobody's expert


@pytest.mark.parametrize("popular", [0, EXPERTS - 1])
def test_one_expert_for_all_tokens_is_worked_through_in_chunks(popular):
    tensors = make_tensors(torch.float64, 61)
    index = torch.stack([torch.full((61,), popular), torch.arange(61) % 2 + 2], dim=1)
    grad_output = torch.randn_like(tensors["x"])
    plain, ours = (
        value_and_gradients(functools.partial(f, index), tensors, torch.float64, grad_output)
        for f in (plain_experts, functools.partial(our_experts, 7))
    )
    assert_same(ours, plain)
    with CountProducts() as counted:
        our_experts(7, index, tensors)
    # A chunk is a seventh of the 122 rows at most: 61 rows of one expert make four of 18 at most.
    assert max(shape[0] for shape in counted.shapes) <= 18
    assert sum(count for shape, count in counted.shapes.items() if shape[1] == 2 * INTERMEDIATE) == 4 + 2 + 2


def test_numbers_that_name_no_expert():
    """With them expert parallelism marks what another rank computes."""
    tensors, index = make_tensors(torch.float64, 61), make_index(61)
    index[::3, 0] = EXPERTS
    index[::5] = EXPERTS + 7
    grad_output = torch.randn_like(tensors["x"])
    plain, ours = (
        value_and_gradients(functools.partial(f, index), tensors, torch.float64, grad_output)
        for f in (plain_experts, functools.partial(our_experts, 5))
    )
    assert_same(ours, plain)
    assert not ours["output"][0].any()
    assert not ours["x"][0].any()


@pytest.mark.parametrize(
    "frozen",
    [{"x"}, {"scores"}, {"up", "down", "up_bias", "down_bias"}, {"down", "up_bias"}, {"x", "scores", "up", "up_bias"}],
    ids=["input", "scores", "weights", "some", "all-but-down"],
)
@pytest.mark.parametrize("name", ["swiglu", "transposed-bias-clamped"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(name, frozen):
    of_tensors, settings = VARIANTS[name]
    tensors, index = make_tensors(torch.float64, 31, **of_tensors), make_index(31)
    frozen = frozen & tensors.keys()
    plain, ours = leaves(tensors, frozen=frozen), leaves(tensors, frozen=frozen)
    plain_experts(index, plain, **settings).square().sum().backward()
    our_experts(4, index, ours, **settings).square().sum().backward()
    assert {name for name in ours if ours[name].grad is None} == frozen
    trained = tensors.keys() - frozen
    assert_same({name: ours[name].grad for name in trained}, {name: plain[name].grad for name in trained})


def test_no_tokens():
    tensors = leaves(make_tensors(torch.float64, 0))
    out = our_experts(4, make_index(0), tensors)
    out.sum().backward()
    assert out.shape == (0, HIDDEN)
    assert not any(grad.any() for grad in gradients(tensors).values())


def test_router_weights_in_fp32_beside_16_bit_states():
    """As routers compute them; their gradient must not be rounded to 16 bits."""
    tensors, index = make_tensors(torch.bfloat16, 507), make_index(507)
    tensors["scores"] = torch.rand(507, TOP_K)
    truth, grads = {}, {}
    for name, function, dtype in (("truth", plain_experts, torch.float64), ("ours", our_experts, None)):
        own = leaves({key: value.to(dtype) if dtype else value for key, value in tensors.items()})
        out = function(index, own) if name == "truth" else function(16, index, own)
        out.backward(torch.ones_like(out))
        (truth if name == "truth" else grads)["scores"] = own["scores"].grad
    assert grads["scores"].dtype == torch.float32
    # The states' own rounding is the error: in 16 bits the sum over them would have four times as much.
    assert (grads["scores"].double() - truth["scores"]).norm() <= 4e-3 * truth["scores"].norm()


def test_a_transposed_input_and_an_expanded_incoming_gradient():
    tensors, index, results = make_tensors(torch.float64, HIDDEN), make_index(HIDDEN), []
    for function in (plain_experts, functools.partial(our_experts, 3)):
        own = leaves(tensors)
        function(index, {**own, "x": own["x"].t()}).sum().backward()
        results.append(gradients(own))
    assert_same(results[1], results[0])


def test_under_recompute():
    tensors, index = make_tensors(torch.float64, 61), make_index(61)
    grad_output = torch.randn_like(tensors["x"])
    plain = value_and_gradients(functools.partial(plain_experts, index), tensors, torch.float64, grad_output)

    def recomputed(own):
        return checkpoint(our_experts, 5, index, own, use_reentrant=False)

    assert_same(value_and_gradients(recomputed, tensors, torch.float64, grad_output), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_without_the_output(dtype):
    tensors, index = make_tensors(dtype, 61), make_index(61)
    grad_output = torch.randn_like(tensors["x"])
    first, again = (
        value_and_gradients(functools.partial(our_experts, 5, index, skips_output=skips), tensors, dtype, grad_output)
        for skips in (False, True)
    )
    assert all(torch.equal(again[name], first[name]) for name in first if name != "output")
    with CountProducts() as counted:
        output = our_experts(5, index, tensors, skips_output=True)
    assert not counted.shapes
    assert (output.shape, output.dtype) == (first["output"].shape, dtype)


@pytest.mark.parametrize("name", VARIANTS)
def test_weight_gradients_are_added_to_a_layers_sums(name):
    """Over two calls, and not through autograd; what is no parameter of the layer, or frozen, as ever."""
    of_tensors, settings = VARIANTS[name]
    tensors, index = make_tensors(torch.float64, 122, **of_tensors), make_index(122)
    truth = leaves(tensors)
    plain_experts(index, truth, **settings).square().sum().backward()
    own = leaves(tensors, frozen={"up_bias"})
    sums = ParameterSums([tensor for name, tensor in own.items() if name not in ("x", "scores")])
    for rows in (slice(0, 50), slice(50, None)):
        part = own | {"x": own["x"][rows], "scores": own["scores"][rows]}
        our_experts(5, index[rows], part, sums=sums, **settings).square().sum().backward()
    assert {name for name in own if own[name].grad is not None} == {"x", "scores"}
    names = {id(tensor): name for name, tensor in own.items()}
    found = {names[id(each.parameter)]: each.rounded() for each in sums.sums}
    assert found.pop("up_bias", None) is None
    assert_same(found, {name: truth[name].grad for name in found})


def test_a_second_backward_through_a_retained_graph_gives_the_same():
    tensors = leaves(make_tensors(torch.bfloat16, 61))
    loss = our_experts(4, make_index(61), tensors).square().mean()
    first = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, list(tensors.values()))))


def test_a_second_derivative_is_refused_not_wrong():
    tensors = leaves(make_tensors(torch.float64, 5))
    loss = our_experts(2, make_index(5), tensors).square().sum()
    (dx,) = torch.autograd.grad(loss, tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast(backward_inside):
    tensors, index = make_tensors(torch.float32, 507), make_index(507)
    grad_output = torch.randn_like(tensors["x"])
    truth = value_and_gradients(functools.partial(plain_experts, index), tensors, torch.float64, grad_output)
    results = []
    for function in (plain_experts, functools.partial(our_experts, 16)):
        own = leaves(tensors)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(index, own)
            if backward_inside:
                out.backward(grad_output.to(out.dtype))
        if not backward_inside:
            out.backward(grad_output.to(out.dtype))
        assert all(grad.dtype == torch.float32 for grad in gradients(own).values())
        results.append({"output": out.detach(), **gradients(own)})
    assert_within_budget(results[1], results[0], truth)


def test_what_is_saved_is_the_inputs_and_the_parameters_themselves():
    """A view would keep the storage that ZeRO-3 has gathered alive; a parameter gives it back."""
    tensors, index = leaves(make_tensors(torch.float32, 9, transposed=True)), make_index(9)
    saved = our_experts(2, index, tensors, transposed=True).grad_fn.saved_tensors
    assert {id(tensor) for tensor in saved} == {id(index), *(id(tensor) for tensor in tensors.values())}


def measure(count, chunks):
    """Peak live bytes of forward and backward, and what the forward holds besides its output."""
    # Real tensors: how many tokens an expert has must be known.
    tensors = leaves(make_tensors(torch.float32, count, bias=False))
    index, grad_output = torch.arange(2 * count).view(count, TOP_K) % EXPERTS, torch.ones(count, HIDDEN)
    with LiveMemory() as memory:
        out = our_experts(chunks, index, tensors)
        forward, held = memory.peak, memory.live - out.nbytes
        memory.reset_peak()
        out.backward(grad_output)
    return forward, held, memory.peak


def test_peak_memory_is_that_of_one_chunk_and_one_expert():
    forward, held, backward = measure(4096, 32)
    twice = measure(8192, 64)
    print(f"chunked experts, MiB: forward {forward / MIB:.2f}, held {held / MIB:.2f}, backward {backward / MIB:.2f}")
    states, places, rows = 4096 * HIDDEN * 4, 4096 * TOP_K * 8, 256
    gradient = EXPERTS * 3 * INTERMEDIATE * HIDDEN * 4
    # The output, where each row goes, and of a chunk: its input, gate and up, their product, its result, this weighted.
    chunk = rows * 4 * (3 * HIDDEN + 5 * INTERMEDIATE)
    assert forward <= states + 5 * places + chunk
    assert held == 0
    # The gradients of all experts once, of one expert once more.
    assert backward <= 2 * states + 6 * places + gradient * (1 + 1 / EXPERTS) + 2.5 * chunk
    # The chunks keep their size: only what is as long as the sequence grows.
    assert twice[0] - forward <= states + 5 * places
    assert twice[2] - backward <= 2 * states + 6 * places


@pytest.mark.parametrize("chunks", [0, -2])
def test_less_than_one_chunk_is_refused(chunks):
    with pytest.raises(ValueError, match=f"chunks must be at least 1, got {chunks}"):
        our_experts(chunks, make_index(3), make_tensors(torch.float32, 3))


@pytest.mark.parametrize("name", ["up", "down"])
def test_a_weight_that_zero3_has_not_gathered_is_refused(name):
    tensors = make_tensors(torch.float32, 3) | {name: torch.empty(0)}
    with pytest.raises(ValueError, match=f"{name}_weight has no elements: ZeRO-3 has not gathered it"):
        our_experts(2, make_index(3), tensors)


@pytest.mark.parametrize(
    "other",
    [{"x": torch.zeros(1, 3, HIDDEN)}, {"scores": torch.zeros(3)}, {"scores": torch.zeros(3, TOP_K + 1)}],
    ids=["batch", "no-top-k", "top-k"],
)
def test_other_shapes_are_refused(other):
    with pytest.raises(ValueError, match=r"hidden_states must be \(tokens, hidden\), .* got"):
        our_experts(2, make_index(3), make_tensors(torch.float32, 3) | other)

"""The chunked MLP that keeps gate and up: bit for bit what computing them again gives, without the products."""

import functools

import pytest
import torch
import torch.nn.functional as F
from count_products import CountProducts
from error_budget import gradients, leaves, value_and_gradients
from plain_mlp import HIDDEN, INTERMEDIATE, make_tensors, our_mlp, stored
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence import KeptProjections, ParameterSums
from mst_ds.recompute import KeptOnDevice

MIB = 2**20
LAYOUTS = [
    pytest.param({"gate_in_up": fused, "transposed": transposed}, id=f"{fused=}-{transposed=}")
    for fused in (False, True)
    for transposed in (False, True)
]


def both_ways(tensors, dtype=torch.float32, chunks=4, activation=F.silu, **layout):
    """Output and gradients when gate and up are computed again, and when they are kept."""
    grad_output = torch.randn_like(tensors["x"])
    ours = functools.partial(our_mlp, chunks, activation=activation, **layout)
    return (
        value_and_gradients(functools.partial(ours, keep=keep), tensors, dtype, grad_output) for keep in (False, True)
    )


def assert_identical(kept, again):
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in again)


@pytest.mark.parametrize("chunks", [1, 4, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_bits(layout, bias, dtype, chunks):
    tensors = stored(make_tensors(dtype, (3, 101), bias=bias), **layout)
    assert_identical(*both_ways(tensors, dtype, chunks, **layout))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunks", [1, 7])
def test_a_plain_mlp_gives_the_same_bits(chunks, transposed):
    tensors = stored(make_tensors(torch.float32, (3, 101), gate=False), gate_in_up=False, transposed=transposed)
    assert_identical(*both_ways(tensors, chunks=chunks, transposed=transposed))


# Of its input, of its output, of neither; and one that returns what it is given.
@pytest.mark.parametrize("activation", [F.gelu, torch.tanh, F.relu, torch.nn.Identity()])
@pytest.mark.parametrize("gate", [True, False])
def test_activations(activation, gate):
    assert_identical(*both_ways(make_tensors(torch.float32, (2, 37), gate=gate), activation=activation))


@pytest.mark.parametrize("shape", [(2, 0), (1,), (3, 1021)], ids=str)
def test_lengths(shape):
    assert_identical(*both_ways(make_tensors(torch.float32, shape), chunks=8))


@pytest.mark.parametrize(
    "frozen",
    [{"x"}, {"gate", "up", "down", "gate_bias", "up_bias", "down_bias"}, {"up"}],
    ids=lambda names: "-".join(sorted(names)),
)
def test_what_is_frozen_gets_no_gradient(frozen):
    results = []
    for keep in (False, True):
        tensors = leaves(make_tensors(torch.float32, (2, 19)), frozen=frozen)
        our_mlp(4, tensors, keep=keep).square().sum().backward()
        assert {name for name in tensors if tensors[name].grad is None} == frozen
        results.append({name: tensor.grad for name, tensor in tensors.items() if name not in frozen})
    assert_identical(*results)


def test_autocast_keeps_what_it_computes_in():
    results = []
    for keep in (False, True):
        tensors = leaves(make_tensors(torch.float32, (2, 37)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = our_mlp(4, tensors, keep=keep)
        output.float().square().sum().backward()
        results.append({"output": output.detach(), **gradients(tensors)})
    assert_identical(*results)


@pytest.mark.parametrize("activation", [F.silu, torch.nn.Identity()])
def test_a_second_backward_through_a_retained_graph_gives_the_same(activation):
    tensors = leaves(make_tensors(torch.float32, (2, 37)))
    loss = our_mlp(4, tensors, activation, keep=True).square().mean()
    first = torch.autograd.grad(loss, list(tensors.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(tensors.values()))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("gate", [True, False])
def test_the_backward_computes_nothing_again(gate):
    tensors = leaves(make_tensors(torch.float32, (32,), gate=gate, bias=False))
    with CountProducts() as counted:
        out = our_mlp(4, tensors, keep=True)
    inner = 2 if gate else 1
    assert counted.shapes == {(8, INTERMEDIATE): 4 * inner, (8, HIDDEN): 4}
    with CountProducts() as counted:
        out.backward(torch.ones_like(out))
    # Of a chunk: down's input gradient, and for gate, up and down the other gradients.
    per_chunk = {(8, INTERMEDIATE): 1, (8, HIDDEN): inner, (INTERMEDIATE, HIDDEN): inner, (HIDDEN, INTERMEDIATE): 1}
    assert counted.shapes == {shape: 4 * count for shape, count in per_chunk.items()}


def test_nothing_is_kept_that_no_backward_reads():
    tensors = make_tensors(torch.float32, (64,), bias=False)
    trained = leaves(tensors)
    with LiveMemory() as memory:
        our_mlp(4, tensors)
        without = memory.peak
        our_mlp(4, tensors, keep=True)
        with torch.no_grad():
            our_mlp(4, trained, keep=True)
        assert memory.peak == without
        out = our_mlp(4, trained, keep=True)
        assert memory.live == out.nbytes + 2 * 64 * INTERMEDIATE * 4
        out.sum().backward()
        del out
        assert memory.live == sum(tensor.nbytes for tensor in tensors.values())


def measure(gate):
    """Live bytes in MiB of 4096 tokens, hidden 256, intermediate 1024, in 16 chunks: both peaks, and what is held."""
    tensors = leaves(make_tensors(torch.float32, (4096,), gate=gate, bias=False, hidden=256, intermediate=1024))
    grad_output = torch.ones(4096, 256)
    with LiveMemory() as memory:
        out = our_mlp(16, tensors, keep=True)
        forward, held = memory.peak, memory.live - out.nbytes
        memory.reset_peak()
        out.backward(grad_output)
    return [count / MIB for count in (forward, held, memory.peak)]


def test_peak_memory():
    with FakeTensorMode():
        gated, plain = measure(True), measure(False)
    # Gate and up of 16 MiB each. In the forward also the output of 4 and a chunk's product of 1. In the backward the
    # output, the input's gradient of 4, three weight gradients of 1 and three of a chunk's tensors.
    assert gated == pytest.approx([32 + 4 + 1, 32, 32 + 4 + 4 + 3 + 3], abs=0.01)
    assert plain == pytest.approx([16 + 4 + 1, 16, 16 + 4 + 4 + 2 + 2], abs=0.01)


def first_and_again(tensors, kept, dtype=torch.float32, chunks=4, **layout):
    """Output and gradients of a layer's call and of the one that computes it again, with what the first has kept."""
    grad_output = torch.randn_like(tensors["x"])
    for _ in range(2):
        ours = functools.partial(our_mlp, chunks, keep=kept, **layout)
        yield value_and_gradients(ours, tensors, dtype, grad_output)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("transposed", [False, True])
def test_what_was_kept_gives_the_same_bits_when_the_layer_is_computed_again(transposed, dtype, gate):
    layout = {"gate_in_up": False, "transposed": transposed}
    tensors = stored(make_tensors(dtype, (3, 101), gate=gate), **layout)
    first, again = first_and_again(tensors, KeptProjections(KeptOnDevice), dtype, **layout)
    assert_identical(first, again)


def test_a_layer_that_is_computed_again_needs_only_down_for_its_output():
    tensors, kept = leaves(make_tensors(torch.float32, (32,), bias=False)), KeptProjections(KeptOnDevice)
    our_mlp(4, tensors, keep=kept)
    with CountProducts() as counted:
        our_mlp(4, tensors, keep=kept)
    assert counted.shapes == {(8, HIDDEN): 4}


def test_what_was_kept_is_taken_once():
    tensors, kept = leaves(make_tensors(torch.float32, (32,))), KeptProjections(KeptOnDevice)
    our_mlp(4, tensors, keep=kept)
    our_mlp(4, tensors, keep=kept)
    with pytest.raises(RuntimeError, match="a second backward through the same loss needs a second forward"):
        our_mlp(4, tensors, keep=kept)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_the_output_gradients_have_the_same_bits(layout, kept):
    tensors = stored(make_tensors(torch.bfloat16, (3, 101)), **layout)
    grad_output = torch.randn_like(tensors["x"])
    expected = value_and_gradients(functools.partial(our_mlp, 4, **layout), tensors, torch.bfloat16, grad_output)
    keep = KeptProjections(KeptOnDevice) if kept else False
    if kept:
        our_mlp(4, tensors, keep=keep, **layout)
    ours = functools.partial(our_mlp, 4, keep=keep, skips_output=True, **layout)
    found = value_and_gradients(ours, tensors, torch.bfloat16, grad_output)
    assert found.pop("output").shape == expected.pop("output").shape
    assert_identical(found, expected)
    with CountProducts() as counted:
        our_mlp(4, tensors, skips_output=True, **layout)
    assert not counted.shapes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_gradients_are_added_to_a_layers_sums(layout):
    """Over two calls, unrounded, and not through autograd; what is frozen as ever."""
    tensors = make_tensors(torch.bfloat16, (3, 40))
    truth = leaves({name: tensor.double() for name, tensor in stored(tensors, **layout).items()})
    our_mlp(1, truth, **layout).square().sum().backward()
    own = leaves(stored(tensors, **layout), frozen={"up_bias"})
    sums = ParameterSums([tensor for name, tensor in own.items() if name != "x"])
    for rows in (slice(0, 11), slice(11, None)):
        our_mlp(4, own | {"x": own["x"][:, rows]}, sums=sums, **layout).float().square().sum().backward()
    assert {name for name in own if own[name].grad is not None} == {"x"}
    for total in sums.sums:
        (name,) = [name for name, tensor in own.items() if tensor is total.parameter]
        if name == "up_bias":
            assert total.total is None
        else:
            assert total.total.dtype == (torch.float64 if "bias" in name else torch.float32)
            assert (total.total - truth[name].grad).norm() <= 2e-2 * truth[name].grad.norm()

"""Any module that works token by token, in chunks."""

import functools

import pytest
import torch
from plain_tokenwise import HIDDEN, Mlp, assert_same, ours, output_and_gradients, over_chunks, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence import ParameterSums, chunked_tokenwise

MIB = 2**20


class Experts(nn.Module):
    """Separate experts; each token goes to the one that its index names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN).double() for _ in range(4))

    def forward(self, x, index, weights):
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            tokens = torch.where(index[..., 0] == number)
            if len(tokens[0]):
                out[tokens] = expert(x[tokens]) * weights[tokens]
        return out


@pytest.mark.parametrize(("shape", "chunks"), [((2, 37), 5), ((9,), 4), ((1, 3), 64), ((2, 3, 7), 4), ((101,), 1)])
def test_values_and_every_gradient(shape, chunks):
    module, x = Mlp(), tokens(*shape)
    assert_same(output_and_gradients(ours(module, chunks), module, x), output_and_gradients(module, module, x))


def test_gradients_without_the_output():
    module, x = Mlp(torch.bfloat16, dropout=0.3), tokens(2, 37, dtype=torch.bfloat16)
    results = []
    for skips_output in (False, True):
        torch.manual_seed(2)
        found = output_and_gradients(ours(module, 5, skips_output=skips_output), module, x)
        assert found.pop("output").shape == x.shape
        results.append(found)
    assert all(torch.equal(results[1][name], results[0][name]) for name in results[0])
    calls = []
    with torch.no_grad():
        chunked_tokenwise(lambda x: calls.append(x.shape) or x, [x], [], chunks=5, skips_output=True)
    assert calls == [(1, 1, HIDDEN)], "a token tells the width"


def test_weight_gradients_are_added_to_a_layers_sums():
    """Over two calls, in fp32 at least, and not through autograd."""
    module, x = Mlp(), tokens(2, 40)
    expected = output_and_gradients(module, module, x)
    module.zero_grad()
    module.down.bias.requires_grad_(False)
    sums = ParameterSums(module.parameters())
    for rows in (slice(0, 11), slice(11, None)):
        out = ours(module, 5, sums=sums)(x[:, rows])
        out.backward(torch.ones_like(out).cumsum(-1))
    assert all(parameter.grad is None for parameter in module.parameters())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {names[id(each.parameter)]: each.rounded() for each in sums.sums}
    assert found.pop("down.bias") is None
    assert_same(found, {name: expected[name] for name in found})


def test_several_inputs_of_which_one_is_an_index():
    module, x = Experts(), tokens(2, 37)
    index = torch.randint(4, (2, 37, 1))
    weights = torch.rand(2, 37, 1, dtype=torch.float64, requires_grad=True)
    plain = output_and_gradients(module, module, x, index, weights)
    assert_same(output_and_gradients(ours(module, 5), module, x, index, weights), plain)


def test_an_expert_without_tokens_in_a_chunk_or_at_all():
    """Also where nothing else is trained, so that some chunks have nothing to differentiate."""
    module, x = Experts(), tokens(1, 40)
    index = torch.tensor([0] * 20 + [1] * 12 + [2] * 8)[None, :, None]
    weights = torch.ones(1, 40, 1, dtype=torch.float64)
    for needs_x in (True, False):
        x.requires_grad_(needs_x)
        for number, expert in enumerate(module.experts):
            expert.requires_grad_(needs_x or number in (1, 3))
        results = output_and_gradients(ours(module, 5), module, x, index, weights)
        assert not results["experts.3.weight"].any()
        plain = output_and_gradients(module, module, x, index, weights)
        assert plain.pop("experts.3.weight") is None
        assert plain.pop("experts.3.bias") is None
        assert_same({name: results[name] for name in plain}, plain)


@pytest.mark.parametrize(
    "trained",
    [{"gate", "scale"}, {"x"}, {"down.bias"}, {"x", "norm"}, {"up", "gate.bias"}],
    ids=lambda names: "-".join(sorted(names)),
)
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_right_one(trained):
    module, x = Mlp(), tokens(2, 19)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in trained or name.split(".")[0] in trained)
    x.requires_grad_("x" in trained)
    plain = output_and_gradients(module, module, x)
    results = output_and_gradients(ours(module, 4), module, x)
    assert len(results) < 9
    assert_same(results, plain)


def test_without_anything_to_train_there_is_no_graph():
    module, x = Mlp().requires_grad_(False), tokens(2, 19).detach()
    assert not ours(module, 4)(x).requires_grad
    with torch.no_grad():
        assert not ours(Mlp(), 4)(x).requires_grad


def with_weight_norm():
    module = Mlp()
    parametrizations.weight_norm(module.up)
    parametrizations.weight_norm(module.gate)  # a computed weight beside a bias that is a parameter
    return module


def with_computed_bias():
    module = Mlp()
    nn.utils.parametrize.register_parametrization(module.down, "bias", nn.Tanh())
    return module


def with_shared_weight():
    module = Mlp()
    module.up.weight = module.gate.weight
    return module


@pytest.mark.parametrize("make", [with_weight_norm, with_computed_bias, with_shared_weight])
def test_weights_that_are_computed_or_shared(make):
    module, x = make(), tokens(2, 19)
    assert_same(output_and_gradients(ours(module, 4), module, x), output_and_gradients(module, module, x))


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_a_module_that_writes_to_its_own_intermediates(trained):
    module = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(inplace=True), nn.Linear(HIDDEN, HIDDEN)).double()
    x = tokens(2, 19).requires_grad_(trained == "x")
    assert_same(output_and_gradients(ours(module, 4), module, x), output_and_gradients(module, module, x))


def test_a_transposed_input_and_an_expanded_incoming_gradient():
    module, x = Mlp(), tokens(9, 2)
    results = []
    for function in (module, ours(module, 3)):
        own = x.detach().clone().requires_grad_()
        module.zero_grad()
        function(own.transpose(0, 1)).sum().backward()
        results.append({"x": own.grad, **{name: p.grad for name, p in module.named_parameters()}})
    assert_same(results[1], results[0])


def test_the_output_may_be_added_to_in_place():
    module, x = Mlp(), tokens(2, 19)

    def added(function):
        def run(x):
            out = function(x)
            out += x
            return out

        return run

    plain = output_and_gradients(added(module), module, x)
    assert_same(output_and_gradients(added(ours(module, 4)), module, x), plain)


def test_no_tokens():
    module, x = Mlp(), tokens(2, 0)
    results = output_and_gradients(ours(module, 4), module, x)
    assert results["output"].shape == (2, 0, HIDDEN)
    assert not any(value.any() for value in results.values())


@pytest.mark.parametrize("around", ["nothing", "recompute"])
def test_the_recompute_draws_the_dropout_masks_of_the_forward(around):
    """Against plain autograd over the same chunks under the same seed: the same masks, another for each chunk."""
    module, x = Mlp(dropout=0.5), tokens(2, 37)
    other_dropout = nn.Dropout(0.5)
    results, states = [], []
    for function in (over_chunks(module, 5), ours(module, 5)):

        def block(x, function=function):
            # Random numbers before and after, as an attention with dropout in the same layer draws them.
            return other_dropout(function(other_dropout(x)))

        run = functools.partial(checkpoint, block, use_reentrant=False) if around == "recompute" else block
        torch.manual_seed(7)
        results.append(output_and_gradients(run, module, x))
        states.append(torch.get_rng_state())
    assert_same(results[1], results[0])
    assert torch.equal(*states)
    without = output_and_gradients(ours(module.eval(), 5), module, x)
    assert not torch.equal(without["output"], results[1]["output"])


def test_two_backwards_draw_the_same_masks_and_leave_the_generator_as_it_was():
    module, x = Mlp(dropout=0.5), tokens(2, 37)
    loss = ours(module, 5)(x).square().sum()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    wanted = [x, *module.parameters()]
    first = torch.autograd.grad(loss, wanted, retain_graph=True)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, wanted)))


def test_a_second_derivative_is_refused_not_wrong():
    module, x = Mlp(), tokens(5)
    (dx,) = torch.autograd.grad(ours(module, 2)(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_gradients_accumulate_over_backwards_of_different_scale():
    module, x = Mlp(), tokens(2, 19)
    results = []
    for function in (module, ours(module, 4)):
        module.zero_grad()
        x.grad = None
        for scale in (3.0, -0.5):
            (scale * function(x).square().sum()).backward()
        results.append({"x": x.grad, **{name: p.grad for name, p in module.named_parameters()}})
    assert_same(results[1], results[0])


def measure(count, chunks):
    """Peak live bytes of forward and backward, and what the forward holds besides its output."""
    with FakeTensorMode(), LiveMemory() as memory:
        module = Mlp(torch.float32, hidden=256, intermediate=1024)
        x, grad_output = torch.ones(count, 256, requires_grad=True), torch.ones(count, 256)
        before = memory.live
        memory.reset_peak()
        out = ours(module, chunks)(x)
        forward, held = memory.peak - before, memory.live - before - out.nbytes
        memory.reset_peak()
        out.backward(grad_output)
    return forward, held, memory.peak - before


def test_peak_memory_is_that_of_one_chunk():
    forward, held, backward = measure(4096, 16)
    twice = measure(8192, 32)
    print(f"chunked tokenwise, MiB: forward {forward / MIB:.2f}, held {held / MIB:.2f}, backward {backward / MIB:.2f}")
    # The output of 4 MiB, three of a chunk's tensors of 1 MiB, and one of a quarter.
    assert forward <= 7.5 * MIB
    assert held == 0
    # The output, the input's gradient, three weight gradients of 1 MiB, and what autograd keeps of a chunk.
    assert backward <= 18 * MIB
    # The chunks keep their size: only what is as long as the sequence grows.
    assert twice[0] - forward == 4 * MIB
    assert twice[2] - backward == 8 * MIB


def test_offloading_saved_tensors_takes_the_input_and_leaves_the_parameters():
    module, x = Mlp(), tokens(2, 19)
    packed = []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    def run(x):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            return ours(module, 4)(x)

    plain = output_and_gradients(module, module, x)
    assert_same(output_and_gradients(run, module, x), plain)
    assert [tensor.shape for tensor in packed] == [x.shape]


@pytest.mark.parametrize("chunks", [0, -2])
def test_less_than_one_chunk_is_refused(chunks):
    with pytest.raises(ValueError, match=f"chunks must be at least 1, got {chunks}"):
        ours(Mlp(), chunks)(tokens(3))


def test_a_parameter_that_zero3_has_not_gathered_is_refused():
    with pytest.raises(ValueError, match="a parameter has no elements: ZeRO-3 has not gathered it"):
        chunked_tokenwise(Mlp(), [tokens(3)], [torch.empty(0)], chunks=2)

"""The gradient of a layer's input is written over that of its output where nobody else holds it, and nowhere else."""

import weakref

import pytest
import torch
from distributed import run_ranks
from small_layers import HIDDEN, Mlp
from steps import build_engine, zero_block
from tiny import tiny_llama, tiny_settings
from torch import nn
from torch.autograd import grad

from mst_ds import apply_settings
from mst_ds.layer_stream import LayerStream, StreamedLayer

CHUNKS, SHAPE = 3, (2, 14, HIDDEN)


def layers_and_input(count=2):
    torch.manual_seed(3)
    return [Mlp() for _ in range(count)], torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)


def outputs(layers, x, chunks=CHUNKS):
    """The layers' input and what each gives."""
    stream = LayerStream(chunks=chunks)
    tensors = [x * 1]
    for layer in layers:
        tensors.append(StreamedLayer(stream, layer)(tensors[-1]))
    return tensors


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_one_gradient_goes_through_all_layers():
    layers, x = layers_and_input()
    tensors, addresses = outputs(layers, x), []
    for tensor in tensors:
        tensor.register_hook(lambda gradient: addresses.append(gradient.data_ptr()))
    (found,) = grad(tensors[-1].sin().sum(), x)
    assert len(addresses) == 3
    assert len(set(addresses)) == 1
    assert_same(found, grad(layers[1](layers[0](x)).sin().sum(), x)[0])


class SinOfExp(nn.Module):
    """Notes whether a storage lives when the gradient of what is between is there."""

    def __init__(self):
        super().__init__()
        self.storage, self.lives = None, []

    def forward(self, x):
        between = x.exp()
        if between.requires_grad:
            between.register_hook(lambda _: self.lives.append(self.storage() is not None))
        return between.sin()


@pytest.mark.parametrize("is_held", [False, True])
def test_a_layer_of_one_chunk_lets_go_of_the_gradient_that_it_has_used(is_held):
    layer, x, held = SinOfExp(), layers_and_input(0)[1], []

    def note(gradient):
        layer.storage = weakref.ref(gradient.untyped_storage())
        held.extend([gradient] * is_held)

    y = outputs([layer], x, 1)[-1]
    y.register_hook(note)
    (found,) = grad(y.cos().sum(), x)
    assert layer.lives == [is_held]
    assert_same(found, grad(layer(x).cos().sum(), x)[0])


def by_hook(take):
    def hold(x, tensors):
        taken = []
        tensors[1].register_hook(lambda gradient: taken.append(take(gradient)))
        return *grad(tensors[-1].sin().sum(), x), taken[0]

    return hold


def retained(x, tensors):
    tensors[1].retain_grad()
    return *grad(tensors[-1].sin().sum(), x), tensors[1].grad


def asked_for(x, tensors):
    return grad(tensors[-1].sin().sum(), [x, tensors[1]])


def given_to_a_hook_afterwards(x, tensors):
    found = []
    tensors[1].grad_fn.register_hook(lambda _, of_output: found.append(of_output[0].clone()))
    return *grad(tensors[-1].sin().sum(), x), found[0]


HOLDERS = {
    "hook": by_hook(lambda gradient: gradient),
    "view": by_hook(lambda gradient: gradient.view(-1)),
    "alias": by_hook(lambda gradient: gradient.detach()),
    "memory": by_hook(lambda gradient: torch.empty(0, dtype=gradient.dtype).set_(gradient.untyped_storage())),
    "array": by_hook(lambda gradient: gradient.numpy()),
    "retained": retained,
    "asked for": asked_for,
    "hook of the node": given_to_a_hook_afterwards,
}


@pytest.mark.parametrize("chunks", [1, CHUNKS])
@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_what_somebody_holds_is_not_written_over(hold, chunks):
    """Of the first layer's output."""
    layers, x = layers_and_input()
    between = layers[0](x)
    expected = grad(layers[1](between).sin().sum(), [x, between])
    of_x, held = hold(x, outputs(layers, x, chunks))
    assert_same(of_x, expected[0])
    assert_same(torch.as_tensor(held).view(SHAPE), expected[1])


@pytest.mark.parametrize("chunks", [1, CHUNKS])
def test_the_callers_gradient_is_not_written_over(chunks):
    layers, x = layers_and_input()
    given = torch.ones(SHAPE, dtype=torch.float64)
    outputs(layers, x, chunks)[-1].backward(given)
    assert (given == 1).all()
    assert_same(x.grad, grad(layers[1](layers[0](x)).sum(), x)[0])


@pytest.mark.parametrize("chunks", [1, CHUNKS])
def test_another_librarys_memory_is_not_written_over(chunks):
    array = torch.ones(SHAPE, dtype=torch.float64).numpy()

    class FromArray(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, grad):
            return torch.from_numpy(array)

    layers, x = layers_and_input()
    FromArray.apply(outputs(layers, x, chunks)[-1]).backward()
    assert (array == 1).all()


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_a_gradient_that_goes_elsewhere_too_is_not_written_over(is_first):
    """A leaf takes a view of it for its own, before the layer has it or afterwards."""
    layers, x = layers_and_input()
    leaf = torch.zeros(x.numel(), dtype=torch.float64, requires_grad=True)
    # What was called last is differentiated first.
    before = leaf.view(SHAPE)
    y = outputs(layers, x)[-1]
    (y + (leaf.view(SHAPE) if is_first else before)).sin().sum().backward()
    expected = layers[1](layers[0](x))
    assert_same(leaf.grad.view(SHAPE), expected.cos())
    assert_same(x.grad, grad(expected.sin().sum(), x)[0])


def test_a_hook_of_the_layer_gets_both_gradients():
    layers, x = layers_and_input(1)
    found = []

    class Streams(nn.Module):
        def forward(self, x):
            return StreamedLayer(LayerStream(chunks=CHUNKS), layers[0])(x)

    module = Streams()
    module.register_full_backward_hook(lambda _, *grads: found.extend(each[0].clone() for each in grads))
    module(x * 1).sin().sum().backward()
    expected = layers[0](x)
    assert_same(found[0], grad(expected.sin().sum(), x, retain_graph=True)[0])
    assert_same(found[1], expected.cos())


class LeavesOut(nn.Module):
    """What it gives of some chunks does not depend on what it was given."""

    def forward(self, x):
        self.calls = getattr(self, "calls", -1) + 1
        return x * 2 if self.calls % CHUNKS != 1 else x.detach() * 2


def test_tokens_that_nothing_depends_on_have_no_gradient():
    x = layers_and_input(0)[1]
    y = StreamedLayer(LayerStream(chunks=CHUNKS), LeavesOut())(x * 1)
    (found,) = grad(y.sin().sum(), x)
    expected = 2 * (2 * x).cos()
    expected[:, 5:10] = 0
    assert_same(found, expected)


def places_under_zero(rank, stage):
    """Of the gradients of what each layer gives, in the second step, and of those that a user's hook holds."""
    model = apply_settings(tiny_llama(num_hidden_layers=3), tiny_settings(layer_chunks=CHUNKS), zero_stage=stage)
    engine, places, held = build_engine(model, zero_optimization=zero_block(stage)), [], []
    layers = engine.module.model.layers

    def note(module, args, output):
        (output[0] if isinstance(output, tuple) else output).register_hook(
            lambda gradient: places.append(gradient.data_ptr())
        )

    ids = torch.arange(2, 26)[None]
    for step in range(3):
        places.clear()
        if step == 1:
            for layer in layers:
                layer.register_forward_hook(note)
        if step == 2:
            layers[1].register_full_backward_hook(lambda module, _, grads: held.append(grads[0].clone()))
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
        if step == 1:
            shared = len(places), len(set(places))
    engine.destroy()
    return shared, len(set(places))


@pytest.mark.parametrize("stage", [0, 3])
def test_one_gradient_goes_through_all_layers_of_an_engine(stage):
    """ZeRO-3 has hooks on the layers; a user's own among them gets what it was promised."""
    for shared, with_hook in run_ranks(places_under_zero, 2, stage):
        assert shared == (3, 1)
        assert with_hook == 2

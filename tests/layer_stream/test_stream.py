"""A layer that runs chunk by chunk: what each chunk gets and leaves, and what a layer may be and give."""

import pytest
import torch
from small_layers import HIDDEN, Mlp
from torch import nn

from mst_ds.layer_stream import LayerStream, Pass, StreamedLayer
from mst_ds.recompute import HostStore

BATCH, LENGTH = 2, 14
EACH = pytest.mark.parametrize("chunks", [1, 3])


def streamed(layer, chunks=3, **settings):
    """The layer's forward, and the stream in which it runs."""
    stream = LayerStream(chunks=chunks, **settings)
    return StreamedLayer(stream, layer), stream


def states(**settings):
    torch.manual_seed(3)
    return torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True, **settings)


def assert_same_gradients(found, expected, atol=1e-13):
    assert len(found) == len(expected)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=atol)


class Layer(nn.Module):
    """Notes what it was given, a random number, and what its call says."""

    def __init__(self, stream):
        super().__init__()
        self.stream, self.seen = stream, []
        self.weight = nn.Parameter(torch.ones(HIDDEN, dtype=torch.float64))

    def forward(self, x, *args, **kwargs):
        call = self.stream.call
        notes = [call.note(lambda: torch.rand(()).item()) for _ in range(2)]
        self.seen.append((call.runs_for, call.chunk, notes, args, kwargs, torch.is_grad_enabled()))
        return (x * x.detach() * self.weight).sin()


def run_two_layers(chunks, *args, **kwargs):
    stream = LayerStream(chunks=chunks)
    layers = [Layer(stream), Layer(stream)]
    y = states()
    for layer in layers:
        y = StreamedLayer(stream, layer)(y, *args, **kwargs)
    assert stream.call is None
    y.sum().backward()
    assert stream.call is None
    return layers


@EACH
def test_chunks_run_forward_and_then_in_reverse_with_their_own_notes(chunks):
    layers = run_two_layers(chunks)
    for layer in layers:
        first, again = layer.seen[:chunks], layer.seen[chunks:]
        assert [(runs_for, chunk) for runs_for, chunk, *_ in first] == [(Pass.FORWARD, i) for i in range(chunks)]
        # Nothing is carried from chunk to chunk, so that no chunk runs for its keys.
        backward = [(runs_for, chunk) for runs_for, chunk, *_ in again]
        assert backward == [(Pass.BACKWARD, i) for i in reversed(range(chunks))]
        assert [is_on for *_, is_on in layer.seen] == [False] * chunks + [True] * chunks
        notes = [each[2] for each in first]
        assert [each[2] for each in reversed(again)] == notes
        assert len({number for pair in notes for number in pair}) == 2 * chunks
    assert layers[0].seen[0][2] != layers[1].seen[0][2]


def test_what_has_tokens_is_cut_and_all_else_is_passed_on():
    tokens = {
        "of a batch": torch.randn(BATCH, LENGTH, 3),
        "of any row": torch.randn(1, LENGTH, 2, 5),
        "positions": torch.arange(LENGTH),
    }
    others = {
        "square": torch.zeros(BATCH, 1, LENGTH, LENGTH),
        "scalar": torch.tensor(2.0),
        "object": object(),
        "none": None,
        "number": LENGTH,
    }
    pair = (torch.randn(1, LENGTH, 4), torch.randn(1, LENGTH, 4))
    (layer, _) = run_two_layers(3, pair, **tokens, **others)
    spans = [slice(0, 5), slice(5, 10), slice(10, 14)]
    for _, chunk, _, args, kwargs, _ in layer.seen:
        span = spans[chunk]
        for found, whole in zip(args[0], pair, strict=True):
            assert torch.equal(found, whole[:, span])
        for name in ("of a batch", "of any row"):
            assert torch.equal(kwargs[name], tokens[name][:, span])
        assert torch.equal(kwargs["positions"], tokens["positions"][span])
        assert all(kwargs[name] is others[name] for name in others)


class Gives(nn.Module):
    """A tuple, of which one tensor nobody needs, from two inputs that are differentiated."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)

    def forward(self, x, *, other, scale=None):
        y = self.linear(x) * other
        return y if scale is None else y * scale, {"flag": True, "norm": y.norm(dim=-1)}, y.detach(), None


@EACH
def test_a_layer_that_gives_several_things_of_several_inputs(chunks):
    layer, x = Gives(), states()
    other = torch.rand(BATCH, LENGTH, 1, dtype=torch.float64, requires_grad=True)
    run, _ = streamed(layer, chunks)
    results = []
    for forward in (layer.forward, run):
        y, of_y, copy, nothing = forward(x, other=other)
        assert of_y["flag"] is True
        assert nothing is None
        grads = torch.autograd.grad((y.sin() + of_y["norm"][..., None]).sum(), [x, other, *layer.parameters()])
        results.append([y, of_y["norm"], copy, *grads])
    assert_same_gradients(results[1], results[0])


@EACH
def test_an_input_that_every_chunk_reads_whole(chunks):
    layer, x = Gives(), states()
    other = torch.rand(BATCH, LENGTH, 1, dtype=torch.float64)
    scale = torch.rand(HIDDEN, dtype=torch.float64, requires_grad=True)
    run, _ = streamed(layer, chunks)
    results = []
    for forward in (layer.forward, run):
        y, *_ = forward(x, other=other, scale=scale)
        results.append(torch.autograd.grad(y.sin().sum(), [x, scale, *layer.parameters()]))
    assert_same_gradients(results[1], results[0])


@EACH
@pytest.mark.parametrize("make_store", [lambda: None, HostStore], ids=["device", "host"])
def test_a_first_layer_whose_input_needs_no_gradient(chunks, make_store):
    layer, x = Mlp(), states().detach()
    run, _ = streamed(layer, chunks, store=make_store())
    expected = torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))
    assert_same_gradients(torch.autograd.grad(run(x).sin().sum(), list(layer.parameters())), expected)


@EACH
@pytest.mark.parametrize(
    "trained", [set(), {"down.bias"}, {"gate.weight", "norm.weight"}], ids=lambda names: "-".join(sorted(names))
)
def test_frozen_parameters_get_no_gradient_and_the_input_the_right_one(chunks, trained):
    layer, x = Mlp(), states()
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name in trained)
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    run, _ = streamed(layer, chunks)
    assert_same_gradients(torch.autograd.grad(run(x).sum(), leaves), torch.autograd.grad(layer(x).sum(), leaves))
    run(x).sum().backward()
    assert {name for name, parameter in layer.named_parameters() if parameter.grad is not None} == trained


def test_nothing_is_kept_where_nothing_is_trained_or_gradients_are_off():
    stream = LayerStream(chunks=3)
    layer = Layer(stream)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(stream.call.is_kept))
    run = StreamedLayer(stream, layer)
    layer.forward, own = run, layer.forward
    with torch.no_grad():
        found = run(states())
    layer.requires_grad_(False)
    assert torch.equal(run(states().detach()), found)
    assert not found.requires_grad
    assert [(runs_for, chunk) for runs_for, chunk, *_ in layer.seen] == [(Pass.FORWARD, i) for i in range(3)] * 2
    del own


@EACH
def test_random_numbers_are_those_of_the_forward(chunks):
    layer, x = Mlp(dropout=0.4), states()
    leaves = [x, *layer.parameters()]
    results = []
    # Plain autograd over the same chunks of each row draws the same numbers.
    for forward in (over_rows(layer, chunks), streamed(layer, chunks)[0]):
        torch.manual_seed(5)
        y = forward(x)
        after_forward = torch.get_rng_state()
        grads = torch.autograd.grad(y.sin().sum(), leaves)
        assert torch.equal(torch.get_rng_state(), after_forward), "the backward draws nothing"
        results.append((y, after_forward, grads))
    (expected, state, of_expected), (found, of_found, grads) = results
    assert torch.equal(of_found, state)
    assert torch.equal(found, expected)
    assert_same_gradients(grads, of_expected)


def over_rows(layer, chunks):
    """The module by plain autograd on the same tokens, chunk by chunk."""

    def run(x):
        return torch.cat([layer(part) for part in x.tensor_split(chunks, dim=1)], dim=1)

    return run


@EACH
@pytest.mark.parametrize("in_forward", [True, False])
def test_autocast_is_that_of_the_forward(chunks, in_forward):
    layer, x = Mlp(torch.float32), states().detach().float().requires_grad_()
    given = []
    layer.down.register_forward_hook(lambda module, args, output: given.append(output.detach()))
    run, _ = streamed(layer, chunks)
    with torch.autocast("cpu", torch.bfloat16, enabled=in_forward):
        loss = run(x).sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=not in_forward):
        loss.backward()
        assert torch.is_autocast_enabled("cpu") is not in_forward
    assert len(given) == 2 * chunks
    assert {output.dtype for output in given} == {torch.bfloat16 if in_forward else torch.float32}
    for first, again in zip(given[:chunks], reversed(given[chunks:]), strict=True):
        assert torch.equal(first, again)
    assert x.grad.dtype == layer.gate.weight.grad.dtype == torch.float32


def test_a_second_backward_is_refused():
    run, stream = streamed(Mlp())
    loss = run(states()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second (backward|time)"):
        loss.backward()
    assert stream.call is None


@pytest.mark.parametrize("fails_in", list(Pass)[::2], ids=lambda each: each.name.lower())
def test_an_error_in_a_layer_leaves_a_stream_that_works(fails_in):
    stream = LayerStream(chunks=3)

    class Fails(Mlp):
        fails = True

        def forward(self, x):
            if self.fails and stream.call is not None and (stream.call.runs_for, stream.call.chunk) == (fails_in, 1):
                raise ValueError("of the layer")
            return super().forward(x)

    layer, x = Fails(), states()
    run = StreamedLayer(stream, layer)
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="of the layer"):
        run(x).sum().backward()
    assert stream.call is None
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    layer.fails, x.grad = False, None
    layer.zero_grad()
    leaves = [x, *layer.parameters()]
    assert_same_gradients(torch.autograd.grad(run(x).sum(), leaves), torch.autograd.grad(layer(x).sum(), leaves))


@EACH
@pytest.mark.parametrize("when", ["after the forward", "in the layer"])
def test_an_input_that_was_written_to_in_place_is_noticed(chunks, when):
    layer, x = Mlp(), states()
    run, _ = streamed(layer, chunks)
    if when == "in the layer":
        layer.forward = lambda y, own=layer.forward: own(y).add(y.mul_(1)) if not torch.is_grad_enabled() else own(y)
        run, _ = streamed(layer, chunks)
    hidden = x * 1
    y = run(hidden)
    if when == "after the forward":
        with torch.no_grad():
            hidden[:, -1] += 1
    with pytest.raises(RuntimeError, match=r"written to in place|modified by an inplace operation"):
        y.sum().backward()


def test_a_layer_inside_another_leaves_its_call():
    stream = LayerStream(chunks=2)
    calls = []

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Mlp()
            self.run_inner = StreamedLayer(stream, self.inner)

        def forward(self, x):
            before = stream.call
            y = self.run_inner(x)
            calls.append(stream.call is before)
            return y

    outer, x = Outer(), states()
    leaves = [x, *outer.inner.parameters()]
    found = torch.autograd.grad(StreamedLayer(stream, outer)(x).sum(), leaves)
    assert all(calls)
    assert_same_gradients(found, torch.autograd.grad(outer.inner(x).sum(), leaves))


class ForAllHeads(nn.Module):
    """Given a number for each token, behind a dimension of heads."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN, dtype=torch.float64))

    def forward(self, x, scale):
        return (x.unsqueeze(1) * scale * self.weight).squeeze(1).sin()


def test_tokens_behind_a_dimension_of_heads_are_cut():
    scale = torch.rand(BATCH, 1, LENGTH, 1, dtype=torch.float64, requires_grad=True)
    layer, x = ForAllHeads(), states()
    wanted = torch.autograd.grad(layer(x, scale).sum(), [x, scale, layer.weight])
    forward, _ = streamed(layer)
    assert_same_gradients(torch.autograd.grad(forward(x, scale).sum(), [x, scale, layer.weight]), wanted)


@EACH
def test_a_hook_of_a_parameter_gets_the_whole_gradient_once(chunks):
    layer, x, seen = Mlp(), states(), []
    wanted = [2 * grad for grad in torch.autograd.grad(layer(x).sin().sum(), list(layer.parameters()))]
    for parameter in layer.parameters():
        parameter.register_hook(lambda grad: seen.append(grad) or 2 * grad)
    streamed(layer, chunks)[0](x).sin().sum().backward()
    assert len(seen) == len(wanted)
    assert_same_gradients([parameter.grad for parameter in layer.parameters()], wanted)


def test_the_gradient_of_an_input_without_tokens_is_summed_in_fp32():
    class Scaled(nn.Module):
        def forward(self, x, scale):
            return x * scale

    x, length = torch.ones(1, 4096, HIDDEN, dtype=torch.bfloat16), 4096
    scale = torch.ones(HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    streamed(Scaled(), 512)[0](x, scale).sum().backward()
    # Of 512 sums of 8 in 16 bits no more than 2048 would be left.
    assert (scale.grad == length).all()

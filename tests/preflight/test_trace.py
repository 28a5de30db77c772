"""What a module took and gave, token by token, and the gradient of its own use of the input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mst_ds.layer_stream import LayerStream, Pass, StreamedLayer, stream_of
from mst_ds.preflight.trace import Tracer, join_traces

BATCH, LENGTH, WIDTH = 2, 3, 4


class Twice(nn.Module):
    """Calls one module two times, and uses its input beside that."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()
        self.mean = Mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(self.scale(hidden_states=x, mask=None) + self.scale(hidden_states=10 * x, mask=None) + x)


class Scale(nn.Module):
    def forward(self, mask: Tensor | None, hidden_states: Tensor) -> Tensor:
        return hidden_states * 3


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(BATCH * LENGTH, WIDTH).sum()


def traced(x: Tensor) -> Tracer:
    model = Twice()
    tracer = Tracer(model, BATCH, LENGTH)
    model(x.requires_grad_()).backward()
    return tracer


def test_the_first_call_of_a_module() -> None:
    x = torch.randn(BATCH, LENGTH, WIDTH)
    record = traced(x).trace["scale"]
    assert record.input is not None
    assert torch.equal(record.input, x.detach())
    assert record.output is not None
    assert torch.equal(record.output, 3 * x.detach())


def test_gradients_are_those_of_this_use() -> None:
    x = torch.randn(BATCH, LENGTH, WIDTH)
    record = traced(x).trace["scale"]
    assert x.grad is not None
    assert (x.grad == 34).all(), "of all uses"
    assert record.input_gradient is not None
    assert (record.input_gradient == 3).all()
    assert record.output_gradient is not None
    assert (record.output_gradient == 1).all()


class Unread(nn.Module):
    """Its values are wrong when a chunk is computed again, as those of an operator whose output nobody reads."""

    def __init__(self, stream: LayerStream) -> None:
        super().__init__()
        self.stream = stream

    def forward(self, x: Tensor) -> Tensor:
        call = self.stream.call
        assert call is not None
        return 3 * x + (call.runs_for is Pass.BACKWARD)


@pytest.mark.parametrize("chunks", [1, 3])
def test_chunks_of_a_streamed_layer_are_joined(chunks: int) -> None:
    """Also where it runs twice: what is recorded is of the first call."""
    length, stream = 14, LayerStream(chunks=chunks)
    model = nn.ModuleDict({"layer": nn.Sequential(nn.Tanh(), Unread(stream))})
    layer = model["layer"]
    layer.forward = StreamedLayer(stream, layer)
    assert stream_of(model) is stream
    tracer = Tracer(model, BATCH, length, stream=stream_of(model))
    x, grads = torch.randn(BATCH, length, WIDTH, requires_grad=True), torch.randn(2, BATCH, length, WIDTH)
    outputs = [layer(x), layer(x + 1)]
    torch.autograd.backward(outputs, list(grads))
    record, inner = tracer.trace["layer.1"], tracer.trace["layer.0"]
    expected = {"input": x.tanh(), "output": 3 * x.tanh(), "input_gradient": 3 * grads[0], "output_gradient": grads[0]}
    for name, tensor in expected.items():
        assert torch.equal(getattr(record, name), tensor), name
    torch.testing.assert_close(inner.input_gradient, 3 * grads[0] * (1 - x.tanh().square()))
    assert list(tracer.trace) == ["layer.0", "layer.1", "layer"]


def test_inner_modules_come_first() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, WIDTH)), nn.Identity())
    tracer = Tracer(model, BATCH, LENGTH)
    model(torch.randn(BATCH, LENGTH, WIDTH))
    assert list(tracer.trace) == ["0.0", "0", "1"]


def test_tokens_in_one_dimension_and_what_is_not_by_token() -> None:
    model = nn.Sequential(nn.Identity())
    flat, other = torch.randn(BATCH * LENGTH, WIDTH), torch.randn(BATCH, LENGTH + 1, WIDTH)
    for value, expected in ((flat, flat.view(BATCH, LENGTH, WIDTH)), (other, None), (torch.ones(2, 3).long(), None)):
        tracer = Tracer(model, BATCH, LENGTH)
        model(value)
        recorded = tracer.trace["0"].output
        assert recorded is expected is None or torch.equal(recorded, expected)


def test_shards_are_joined() -> None:
    shards = [torch.randn(BATCH, LENGTH, WIDTH) for _ in range(2)]
    traces = [traced(shard).trace for shard in shards]
    joined = join_traces(traces, lambda values: values[:, 1:].flatten(0, 1))
    whole = torch.cat([shard.detach() for shard in shards], dim=1)
    record = joined["scale"]
    assert record.output is not None
    assert torch.equal(record.output, 3 * whole[:, 1:].flatten(0, 1))
    # The last row of a gradient is the sum over all tokens, those left out too.
    assert record.input_gradient is not None
    assert record.input_gradient.shape == (2 * (2 * LENGTH - 1) + 1, WIDTH)
    assert (record.input_gradient[-1] == 3 * 2 * 2 * LENGTH).all()
    scalar = joined["mean"].scalar
    assert scalar is not None
    torch.testing.assert_close(scalar, 34 * whole.sum())


def test_a_module_that_one_rank_did_not_call_is_left_out() -> None:
    trace = traced(torch.randn(BATCH, LENGTH, WIDTH)).trace
    assert "mean" not in join_traces([trace, {"scale": trace["scale"]}], lambda values: values.flatten(0, 1))

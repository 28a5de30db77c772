"""Layers that hand on tensors to later ones in a mapping that all are given, and layers of several hidden states."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from small_layers import HIDDEN
from torch import Tensor, nn

from mst_ds.layer_stream import LayerStream, StreamedLayer
from mst_ds.recompute import HostStore

BATCH, LENGTH, HEADS = 2, 14, 2
EACH = pytest.mark.parametrize("chunks", [1, 3])
TOLERANCE = {"rtol": 1e-12, "atol": 1e-13}


class Shared(UserDict):  # type: ignore[type-arg]
    """As transformers' `KVSharingDict`: no dict, so that nothing takes it apart."""


class Layer(nn.Module):
    """Hands on keys and values under `writes`, and reads those under `reads`, token by token."""

    def __init__(self, reads: str | None = None, writes: str | None = None) -> None:
        super().__init__()
        torch.manual_seed(len(f"{reads}{writes}"))
        self.reads, self.writes = reads, writes
        self.mix = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)
        if reads is None:
            self.key, self.value = (nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor, *, shared: Shared) -> Tensor:
        if self.reads is None:
            key, value = (
                linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2).sin() for linear in (self.key, self.value)
            )
        else:
            key, value = shared[self.reads]
        if self.writes is not None:
            shared[self.writes] = key, value
        mixed = (key * value).transpose(1, 2).flatten(2)
        return x + self.mix(x * mixed)


def run(layers: list[Layer], forwards: list[Any], x: Tensor) -> tuple[list[Tensor], Shared]:
    """The last hidden states and all gradients, and what was handed on."""
    shared, y = Shared(), x
    for forward in forwards:
        y = forward(y, shared=shared)
    # Whoever called may differentiate what was handed on, too.
    loss = y.sin().sum() + shared["a"][1].cos().sum()
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    return [y, *torch.autograd.grad(loss, [x, *parameters])], shared


@EACH
@pytest.mark.parametrize("on_host", [False, True])
def test_what_is_handed_on_is_an_output_of_one_layer_and_an_input_of_others(chunks: int, on_host: bool) -> None:
    torch.manual_seed(3)
    x = torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    layers = [Layer(writes="a"), Layer(writes="b"), Layer(reads="a"), Layer(reads="b", writes="c"), Layer(reads="a")]
    stream = LayerStream(chunks=chunks, store=HostStore() if on_host else None)
    stream.begin_forward((BATCH, LENGTH))
    expected, plain = run(layers, layers, x)
    found, shared = run(layers, [StreamedLayer(stream, layer) for layer in layers], x)
    for actual, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)
    assert list(shared) == list(plain) == ["a", "b", "c"]
    for name, tensors in plain.items():
        for actual, wanted in zip(shared[name], tensors, strict=True):
            torch.testing.assert_close(actual, wanted, **TOLERANCE)


def test_without_a_backward_nothing_is_held() -> None:
    """A mapping holds tensors that hold the layer's backward: if that held the mapping, nothing would free them."""
    stream, x = LayerStream(chunks=3), torch.randn(BATCH, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    shared = Shared()
    y = StreamedLayer(stream, Layer(writes="a"))(x, shared=shared)
    node = y.grad_fn
    assert node is not None
    held = node.run.arguments.handed_on  # type: ignore[attr-defined]
    assert held._mappings == []
    assert all(not mapping for mapping in held._empty)


class Streams(nn.Module):
    """Several hidden states of each token, one after another in the first dimension."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.mix = nn.Linear(HIDDEN, HIDDEN), nn.Linear(3, 3)
        self.lengths: set[int] = set()
        self.double()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        self.lengths.add(x.shape[2])
        first = self.linear(x[0]).sin() * scale
        return x + first + self.mix(x.permute(1, 2, 3, 0)).permute(3, 0, 1, 2)


@EACH
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_several_hidden_states_are_cut_by_tokens(chunks: int, rows: int) -> None:
    torch.manual_seed(3)
    x = torch.randn(3, rows, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    scale = torch.rand(rows, LENGTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    layers = [Streams(), copy.deepcopy(Streams())]
    stream = LayerStream(chunks=chunks)
    stream.begin_forward((rows, LENGTH))
    results = []
    for forwards in (layers, [StreamedLayer(stream, layer) for layer in layers]):
        y = x
        for forward in forwards:
            y = forward(y, scale)
        assert layers[0].lengths == ({LENGTH} if chunks == 1 or not results else {LENGTH, 5, 4})
        inputs = [x, scale, *(parameter for layer in layers for parameter in layer.parameters())]
        results.append([y, *torch.autograd.grad(y.sin().sum(), inputs)])
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)

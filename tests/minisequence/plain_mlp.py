"""The MLP in plain torch, and tensors to run it and the chunked one on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mst_ds.minisequence import chunked_mlp

HIDDEN, INTERMEDIATE = 128, 320
Activation = Callable[[Tensor], Tensor]


def plain_mlp(tensors: dict[str, Tensor], activation: Activation = F.silu) -> Tensor:
    up = F.linear(tensors["x"], tensors["up"], tensors.get("up_bias"))
    if "gate" in tensors:
        product = activation(F.linear(tensors["x"], tensors["gate"], tensors.get("gate_bias"))) * up
    else:
        product = activation(up)
    return F.linear(product, tensors["down"], tensors.get("down_bias"))


def our_mlp(chunks: int, tensors: dict[str, Tensor], activation: Activation = F.silu, **settings: bool) -> Tensor:
    return chunked_mlp(
        tensors["x"],
        tensors.get("gate"),
        tensors["up"],
        tensors["down"],
        chunks=chunks,
        activation=activation,
        gate_bias=tensors.get("gate_bias"),
        up_bias=tensors.get("up_bias"),
        down_bias=tensors.get("down_bias"),
        **settings,
    )


def make_tensors(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    gate: bool = True,
    bias: bool = True,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
) -> dict[str, Tensor]:
    """An input of `shape` x hidden and weights that keep its scale."""
    torch.manual_seed(0)
    shapes = {"x": (*shape, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    if gate:
        shapes["gate"] = (intermediate, hidden)
    if bias:
        shapes |= {"up_bias": (intermediate,), "down_bias": (hidden,)}
    if bias and gate:
        shapes["gate_bias"] = (intermediate,)
    scales = {"up": hidden**-0.5, "gate": hidden**-0.5, "down": intermediate**-0.5}
    return {name: (torch.randn(sizes) * scales.get(name, 1)).to(dtype) for name, sizes in shapes.items()}


def stored(tensors: dict[str, Tensor], *, gate_in_up: bool, transposed: bool) -> dict[str, Tensor]:
    """The tensors as a model with another layout stores them."""
    tensors = dict(tensors)
    if gate_in_up:
        tensors["up"] = torch.cat([tensors.pop("gate"), tensors["up"]])
        if "gate_bias" in tensors:
            tensors["up_bias"] = torch.cat([tensors.pop("gate_bias"), tensors["up_bias"]])
    if transposed:
        tensors |= {name: tensors[name].t().contiguous() for name in ("gate", "up", "down") if name in tensors}
    return tensors

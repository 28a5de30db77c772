"""A module that works token by token, itself and in chunks."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from error_budget import assert_equal_but_for_order
from torch import nn

from mst_ds.geometry import chunk_slices
from mst_ds.minisequence import chunked_tokenwise

HIDDEN, INTERMEDIATE = 16, 40
assert_same = functools.partial(assert_equal_but_for_order, atol=1e-12)


class Mlp(nn.Module):
    """A gated MLP with what has no operator of its own: dropout, a norm inside, a residual and a scale."""

    def __init__(self, dtype=torch.float64, dropout=0.0, hidden=HIDDEN, intermediate=INTERMEDIATE):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.up = nn.Linear(hidden, intermediate), nn.Linear(hidden, intermediate, bias=False)
        self.norm = nn.LayerNorm(intermediate)
        self.down = nn.Linear(intermediate, hidden)
        self.scale = nn.Parameter(torch.rand(hidden) + 0.5)
        self.dropout = nn.Dropout(dropout)
        if dtype != torch.float32:  # fake tensors cannot be converted
            self.to(dtype)

    def forward(self, x):
        inner = self.dropout(F.silu(self.gate(x)) * self.up(x))
        return x + self.scale * self.down(self.norm(inner))


def ours(module, chunks, **settings):
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return lambda *inputs: chunked_tokenwise(module, inputs, parameters, chunks=chunks, **settings)


def over_chunks(module, chunks):
    """The module by plain autograd over the same chunks: the reference for what is random."""

    def run(x):
        flat = x.reshape(-1, x.shape[-1])
        return torch.cat([module(flat[None, rows])[0] for rows in chunk_slices(len(flat), chunks)]).view_as(x)

    return run


def output_and_gradients(function, module, *inputs, grad_output=None):
    module.zero_grad()
    inputs = [tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in inputs]
    out = function(*inputs)
    out.backward(torch.ones_like(out).cumsum(-1) if grad_output is None else grad_output.to(out.dtype))
    grads = {f"input {number}": tensor.grad for number, tensor in enumerate(inputs) if tensor.requires_grad}
    grads |= {name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad}
    return {"output": out.detach(), **grads}


def tokens(*shape, dtype=torch.float64, hidden=HIDDEN):
    torch.manual_seed(1)
    return torch.randn(*shape, hidden).to(dtype).requires_grad_()

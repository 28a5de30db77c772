"""Precisions of `chunked_tokenwise`: 16 bits, autocast."""

import contextlib
import functools

import pytest
import torch
import torch.nn.functional as F
from error_budget import assert_within_budget
from plain_tokenwise import HIDDEN, Mlp, ours, output_and_gradients, tokens
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D


class PlainMlp(nn.Module):
    """Linear layers only, as the chunked MLP has them."""

    def __init__(self, dtype, linear=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        sizes = (128, 320), (128, 320), (320, 128)
        if linear is Conv1D:
            self.gate, self.up, self.down = (Conv1D(outputs, inputs) for inputs, outputs in sizes)
        else:
            self.gate, self.up, self.down = (linear(*size) for size in sizes)
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.08 if "weight" in name else 1.0)
        self.to(dtype)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("backward", ["inside", "outside", "inside another"])
def test_autocast_is_that_of_the_forward(backward):
    x = tokens(2, 507, dtype=torch.float32)
    module, exact = Mlp(torch.float32), Mlp(torch.float64)
    grad_output = torch.randn(2, 507, HIDDEN)
    truth = output_and_gradients(exact, exact, x.detach().double().requires_grad_(), grad_output=grad_output)
    results = []
    for function in (module, ours(module, 16)):
        module.zero_grad()
        own = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function(own)
            if backward == "inside":
                out.backward(grad_output.to(out.dtype))
        other = torch.autocast("cpu", dtype=torch.float16) if backward == "inside another" else contextlib.nullcontext()
        if backward != "inside":
            with other:
                out.backward(grad_output.to(out.dtype))
        grads = {"input 0": own.grad, **{name: p.grad for name, p in module.named_parameters()}}
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        results.append({"output": out.detach(), **grads})
    assert results[1]["output"].dtype == results[0]["output"].dtype
    assert_within_budget(results[1], results[0], truth)


def test_autocast_around_the_backward_alone_changes_nothing():
    module, x, results = Mlp(torch.float32), tokens(2, 37, dtype=torch.float32), []
    for function, enabled in ((module, False), (ours(module, 4), False), (ours(module, 4), True)):
        module.zero_grad()
        loss = function(x).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss.backward()
        results.append([parameter.grad for parameter in module.parameters()])
    assert all(map(torch.equal, *results[1:]))
    # In fp32, but for the order of sums: 16 bits anywhere would leave three digits.
    assert all((a - b).norm() <= 1e-5 * b.norm() for a, b in zip(results[1], results[0], strict=True))


@functools.cache
def bf16_cases(linear, trained):
    shape = (3, 1021)
    module, x = PlainMlp(torch.bfloat16, linear), tokens(*shape, dtype=torch.bfloat16, hidden=128)
    exact = PlainMlp(torch.float64, linear)
    exact.load_state_dict(module.state_dict())
    for name, parameter in [*module.named_parameters(), *exact.named_parameters()]:
        parameter.requires_grad_(trained in name)
    grad_output = torch.randn(*shape, 128).bfloat16()
    truth = output_and_gradients(exact, exact, x.detach().double().requires_grad_(), grad_output=grad_output)
    return module, x, grad_output, truth, output_and_gradients(module, module, x, grad_output=grad_output)


@pytest.mark.parametrize(("chunks", "recompute"), [(4, False), (256, False), (256, True)])
@pytest.mark.parametrize(
    ("linear", "trained"), [(nn.Linear, ""), (nn.Linear, "bias"), (Conv1D, "")], ids=["linear", "biases", "conv1d"]
)
def test_error_budget_in_bf16(linear, trained, chunks, recompute):
    """Autograd would round each chunk's weight gradients; under recompute the parameters are still recognised."""
    module, x, grad_output, truth, reference = bf16_cases(linear, trained)
    function = ours(module, chunks)
    run = functools.partial(checkpoint, function, use_reentrant=False) if recompute else function
    assert_within_budget(output_and_gradients(run, module, x, grad_output=grad_output), reference, truth)

"""float64 wherever a model asks for float32: in the forward, the backward, the recompute, in the thread that asked."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mst_ds.preflight.float64 import Float64, default_float64

X = torch.linspace(-2, 2, 8, dtype=torch.float64)
REQUESTS = {
    "float": X.float,
    "to": lambda: X.to(torch.float32),
    "to-keyword": lambda: X.to(dtype=torch.float32),
    "type": lambda: X.type(torch.float32),
    "softmax": lambda: torch.softmax(X, dim=-1, dtype=torch.float32),
    "sum": lambda: X.sum(dtype=torch.float32),
    "zeros": lambda: torch.zeros(3, dtype=torch.float32),
    "arange": lambda: torch.arange(0, 8, 2, dtype=torch.int64).float(),
    "empty_like": lambda: torch.empty_like(X, dtype=torch.float32),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_for_float32_give_float64(name: str) -> None:
    with Float64():
        assert REQUESTS[name]().dtype == torch.float64
    assert REQUESTS[name]().dtype == torch.float32


def test_values_are_not_rounded() -> None:
    with Float64():
        assert torch.equal(X.float(), X)
    assert not torch.equal(X.float().double(), X)


def test_backward_and_recompute() -> None:
    dtypes = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        dtypes.append(x.to(torch.float32).dtype)
        return x.float().exp()

    class Operator(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            dtypes.append(gradient.float().dtype)
            return gradient * 2

    x = X.clone().requires_grad_()
    with Float64():
        Operator.apply(checkpoint(layer, x, use_reentrant=False)).sum().backward()
    assert dtypes == [torch.float64] * 3
    # In float32 the derivative would be off by 1e-8.
    torch.testing.assert_close(x.grad, 2 * X.exp(), rtol=1e-15, atol=0)


def test_another_thread_enters_for_itself() -> None:
    seen = []

    def work() -> None:
        seen.append(X.float().dtype)
        with Float64():
            seen.append(X.float().dtype)

    with Float64():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [torch.float32, torch.float64]


def test_what_asks_for_no_dtype() -> None:
    with pytest.raises(KeyError), default_float64():
        assert (torch.tensor(3) / 7).dtype == torch.float64
        raise KeyError
    assert (torch.tensor(3) / 7).dtype == torch.float32


def test_operations_leave_the_compiler_alone() -> None:
    """Its switching for all threads, around every operation of each, crashes the interpreter now and then."""
    assert not hasattr(Float64.__torch_dispatch__, "__wrapped__")

"""The error budget: truth is plain torch in fp64, reference plain torch in the dtype, candidate what is tested."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

# A factor for luck in the rounding, and the roundings that summing over chunks in fp32 may add to a gradient or a loss.
# It is fp32's epsilon for bf16 too: bf16's own is twice the reference's whole error and would let a defect pass.
FACTOR, EPS = 1.05, torch.finfo(torch.float32).eps

Tensors = dict[str, Tensor]


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth| in the Euclidean norm."""
    return ((actual.double() - truth).norm() / truth.norm()).item()


def relative_errors(actual: Tensors, expected: Tensors) -> dict[str, float]:
    """`relative_error` of each. Nothing expected is 0, or a test would see nothing."""
    assert actual.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if tensor.norm() == 0]
    return {name: relative_error(actual[name], tensor) for name, tensor in expected.items()}


def value_and_gradients(
    function: Callable[[Tensors], Tensor], tensors: Mapping[str, Tensor], dtype: torch.dtype, grad_output: Tensor
) -> Tensors:
    """`function`'s output, under the name "output", and the gradient of each tensor after a backward in `dtype`."""
    leaves = {name: tensor.detach().to(dtype).clone().requires_grad_() for name, tensor in tensors.items()}
    output = function(leaves)
    output.backward(grad_output.to(output.dtype))
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert gradients.keys() == leaves.keys()
    return {"output": output.detach(), **gradients}


def assert_within_budget(candidate: Tensors, reference: Tensors, truth: Tensors) -> None:
    """Every tensor's error is at most the reference's, times 1.05, plus fp32's epsilon."""
    assert candidate.keys() == reference.keys() == truth.keys()
    errors = {name: tuple(relative_error(t[name], truth[name]) for t in (candidate, reference)) for name in truth}
    # Not `>`: a NaN must be over the budget.
    over = {name: pair for name, pair in errors.items() if not pair[0] <= pair[1] * FACTOR + EPS}
    assert not over, f"errors (candidate, reference) over the budget: {over}"


def leaves(tensors: Mapping[str, Tensor], *, frozen: Collection[str] = ()) -> Tensors:
    """Copies to differentiate by, but for the `frozen`."""
    return {name: tensor.clone().requires_grad_(name not in frozen) for name, tensor in tensors.items()}


def gradients(tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: tensor.grad for name, tensor in tensors.items()}


def assert_equal_but_for_order(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, atol: float) -> None:
    """Equal but for the roundings of a sum in another order: both sides are fp64."""
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-11, atol=atol, msg=name)

"""How far two results are apart, and which error still counts as none."""

from __future__ import annotations

import torch

from mst_ds.preflight.compare import Outcome
from mst_ds.preflight.errors import TOLERANCE, is_exact, relative_error


def test_a_gradient_of_zero_may_come_out_as_rounding_errors() -> None:
    """As that of a key's bias without rotary embedding does: relative to itself it would be off by 1 or more."""
    gradients = {"weight": torch.tensor([1.0, 2.0]), "bias": torch.tensor([0.0, 3e-17])}
    rounded = Outcome(torch.tensor(1.0), gradients | {"bias": torch.tensor([2e-17, 0.0])})
    wrong = Outcome(torch.tensor(1.0), gradients | {"bias": torch.tensor([2e-14, 0.0])})
    reference = Outcome(torch.tensor(1.0), gradients)
    assert is_exact(rounded.gradient_errors(reference)["bias"])
    assert not is_exact(wrong.gradient_errors(reference)["bias"])
    assert rounded.gradient_errors(reference)["weight"] == 0


def test_errors() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected * 1.5, expected) == 0.5
    assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2.0
    assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2), least_norm=10.0) == 0.2
    assert is_exact(TOLERANCE)
    assert not is_exact(2 * TOLERANCE)
    assert not is_exact(float("nan"))

"""How far apart two tensors are, and how far they may be."""

from __future__ import annotations

from torch import Tensor

# Two ways to compute the same are within 1e-13 of each other in float64, at the sizes of a preflight; a defect worth
# finding is many orders larger.
TOLERANCE = 1e-9


def relative_error(actual: Tensor, expected: Tensor, least_norm: float = 0.0) -> float:
    """The Frobenius norm of the difference, relative to that of `expected`; absolute where that is 0.

    Args:
        least_norm: an expected norm below it counts as this much, so that rounding errors do not look like errors of a
            tensor that is 0 in exact arithmetic.
    """
    norm = max(float(expected.norm()), least_norm)
    return float((actual - expected).norm()) / (norm or 1.0)


def is_exact(error: float) -> bool:
    """Whether an error is rounding; one that is not a number is none."""
    return error <= TOLERANCE

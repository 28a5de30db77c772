"""When the loop gives up."""

from __future__ import annotations

import pytest

from mst_ds.loop import StepResult, _check_finite


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (StepResult(float("nan"), 1.0), "loss"),
        (StepResult(1.0, float("inf")), "gradient norm"),
    ],
)
def test_a_step_that_is_not_finite_ends_the_run(result: StepResult, name: str) -> None:
    with pytest.raises(FloatingPointError, match=f"the {name} of step 7 is (nan|inf)"):
        _check_finite(7, result, has_loss_scale=False)


def test_in_fp16_a_gradient_that_is_not_finite_is_a_skipped_step() -> None:
    _check_finite(7, StepResult(1.0, float("inf")), has_loss_scale=True)
    with pytest.raises(FloatingPointError, match="the loss of step 7"):
        _check_finite(7, StepResult(float("inf"), 1.0), has_loss_scale=True)

"""What trainers leave behind in their process goes with the test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def no_state_of_accelerate() -> Iterator[None]:
    """Its states are one a process, with the device and the precision of the first trainer; TrainingArguments hands
    them over in the environment."""
    from accelerate.state import AcceleratorState, GradientState

    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(before)

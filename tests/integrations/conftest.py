"""What trainers leave behind in their process goes with the test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """The states of accelerate, one a process, with device and precision of the first trainer; what TrainingArguments
    hand over in the environment; and that the weights of new models are in parts, while the arguments of a trainer with
    ZeRO-3 live."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.clear()
    os.environ.update(before)

"""A process that trainers share with other tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_left_behind() -> Iterator[None]:
    """What trainers leave in their process, a rank's too, goes at the end: accelerate's states, one a process, with the
    device and the precision of the first trainer; what TrainingArguments hand over in the environment; and that the
    weights of new models are in parts, while the arguments of a trainer with ZeRO-3 live."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    before = dict(os.environ)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(before)

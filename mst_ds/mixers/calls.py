"""The functions of transformers that let tokens meet outside attention, by the global names that forwards call."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

from .convolution import convolution
from .gated_recurrence import gated_recurrence
from .scan import SCANS
from .sequence import MixedSequence

OPERATORS: Mapping[str, Callable[..., Any]] = {"causal_conv1d_fn": convolution, **SCANS}
# Of these, those that cannot begin with the state that an earlier chunk of a layer has left.
WHOLE = frozenset(name for name, scan in SCANS.items() if not scan.initial)
# The same as operators of a module's own methods.
METHODS: Mapping[str, Callable[..., Any]] = {"_rnn_scan": gated_recurrence}
# They do a mixer's whole work in one kernel, where it is installed, and give None where it is not.
_FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
# They work on each element by itself: a square root with a bounded derivative.
_ELEMENTWISE = ("SqrtBoundDerivative",)
# What a forward calls in steps of generation alone, and what hides padding that is not seen anyway.
NOT_TRAINED = frozenset(
    {
        "apply_mask_to_padding_states",
        "causal_conv1d_update",
        "mamba2_selective_state_update",
        "mamba_selective_state_update",
        "recurrent_kimi_delta_attention",
        "torch_recurrent_gated_delta_rule",
    }
)
KNOWN = frozenset({*OPERATORS, *_FUSED, *_ELEMENTWISE, *NOT_TRAINED})


def with_operators(forward: types.FunctionType, sequence: MixedSequence) -> Callable[..., Any]:
    """A mixer's forward with this project's operators: a copy of the function, with other globals, so that no other
    instance and no module of transformers is touched.

    Args:
        forward: a function that takes the module first.
        sequence: that it is called for, and no other.
    """
    known = forward.__globals__
    operators: dict[str, Any] = {
        name: functools.partial(operator, sequence, known[name])
        for name, operator in OPERATORS.items()
        if name in known
    }
    operators |= dict.fromkeys(_FUSED, _not_fused)
    copied = types.FunctionType(
        forward.__code__, {**known, **operators}, forward.__name__, forward.__defaults__, forward.__closure__
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    return copied


def _not_fused(*args: Any, **kwargs: Any) -> None:
    return None

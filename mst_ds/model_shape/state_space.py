"""Models whose layers are a state space and nothing else (Mamba, Mamba 2): sizes and counts without attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mst_ds.model_shape.sizes import optional_size, size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class StateSpace:
    """What a layer of such a model consists of, beside a norm before it.

    heads: that are divided among ranks; of Mamba channels, each its own.
    width: of all heads.
    parameter_count: of a layer with its norm.
    """

    heads: int
    width: int
    parameter_count: int


def read_state_space(config: PreTrainedConfig) -> StateSpace | None:
    """None for a model with attention, or of another kind.

    Raises:
        ValueError: without a size.
    """
    # Heads may be of another number in each layer, which is looked at elsewhere.
    if optional_size(config, "state_size") is None or optional_size(config, "num_attention_heads") is not None:
        return None
    hidden, state, taps = (size(config, name) for name in ("hidden_size", "state_size", "conv_kernel"))
    width = size(config, "expand") * hidden
    bias, conv_bias = bool(getattr(config, "use_bias", False)), bool(getattr(config, "use_conv_bias", False))
    heads = optional_size(config, "num_heads")
    if heads is None:
        rank = size(config, "time_step_rank")
        inner, convolved = 2 * width, width
        # The projections to the step, B and C, and of the step; A, and D.
        own = width * (rank + 2 * state) + (rank + 1) * width + width * state + width
    else:
        convolved = width + 2 * size(config, "n_groups") * state
        inner = width + convolved + heads
        own = 3 * heads + width  # the step's bias, A and D; a norm
    projections = hidden * inner + width * hidden + bias * (inner + hidden)
    return StateSpace(
        heads=heads or width,
        width=width,
        parameter_count=projections + convolved * (taps + conv_bias) + own + hidden,
    )

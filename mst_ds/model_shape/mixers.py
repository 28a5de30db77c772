"""What a layer of a decoder that is not attention needs for each token."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MixerShape:
    """What lets a layer's tokens meet other than by attention, such as a gated delta rule.

    Bytes are those of a token of a rank's shard, in the dtype of the training, beside the mixer's input and output.

    Attributes:
        matrix_elements: of its projections.
        saved_bytes: what its forward leaves for its backward.
        saving_bytes: at the highest point of that forward.
        forward_bytes: of a forward that leaves nothing.
        backward_bytes: at the highest point of its backward, with what the forward left.
    """

    matrix_elements: int
    saved_bytes: int
    saving_bytes: int
    forward_bytes: int
    backward_bytes: int

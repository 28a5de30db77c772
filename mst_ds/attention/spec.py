"""What one attention layer computes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with the variations that decoders ask for; scores are `scaling * query · key`.

    Args:
        scaling: factor of the scores.
        dropout: the share of probabilities that is set to 0, the others scaled up.
        window: token i sees the tokens j with i - window < j <= i; None for all j <= i.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118); None for no cap.
        sinks: (n,) for each query head a further logit in the softmax's denominator (GPT-OSS, arXiv 2508.10925);
            None for no sinks.
        front: the first positions, so many, are seen by every query and not counted by its window.
    """

    scaling: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    front: int = 0

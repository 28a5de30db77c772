"""What one attention layer computes."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with the variations that decoders ask for; scores are `scaling * query · key`.

    Args:
        scaling: factor of the scores.
        dropout: the share of probabilities that is set to 0, the others scaled up.
        window: token i sees the tokens j with i - window < j <= i; None for all j <= i.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118); None for no cap.
    """

    scaling: float
    dropout: float = 0.0
    window: int | None = None
    softcap: float | None = None

    def within(self, tokens: int) -> AttentionSpec:
        """The same of so many tokens, without a window that hides none of them."""
        return replace(self, window=None) if self.window is not None and self.window >= tokens else self

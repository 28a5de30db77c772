"""The clipped policy loss of GRPO, DAPO and Dr. GRPO, from the log-probabilities of sampled tokens."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

PolicyLossType = Literal["grpo", "dapo", "dr_grpo"]


def policy_loss(
    log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    loss_type: PolicyLossType = "dapo",
    num_items: Tensor | int | None = None,
    sequence_lengths: Tensor | None = None,
    max_completion_length: int | None = None,
) -> Tensor:
    """`-min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A)` of each sampled token, r = exp(log_probs - old_log_probs).

    The clipped surrogate of PPO (arXiv 1707.06347, equation 7). What its terms are divided by has TRL's names:

    - "grpo" (arXiv 2402.03300, equation 3, without its KL term): each sequence's mean, and the mean of these.
    - "dapo" (arXiv 2503.14476, equation 8): the mean over all tokens.
    - "dr_grpo" (arXiv 2503.20783): a sequence's sum over a length that is the same for all, and the mean of these.

    Args:
        log_probs: (B, L), of the sampled tokens.
        mask: (B, L), 1 where a token counts, such as a completion's.
        advantages: (B,), of each row; or what goes with (B, L), as where documents are packed.
        old_log_probs: (B, L), of the policy that sampled them; None where it is this one: then r is 1, and the
            gradient that of the plain policy gradient.
        epsilon: how far a ratio may fall below 1 before it is clipped.
        epsilon_high: how far it may rise above; None means as far.
        num_items: tokens for "dapo", else sequences, of the whole step; None means those of this call, one a row.
        sequence_lengths: for "grpo": tokens that count in each token's sequence, of whatever goes with (B, L); None
            means in its row.
        max_completion_length: for "dr_grpo".

    Returns:
        A scalar. Of shards and micro-batches with the same `num_items` and whole `sequence_lengths` it adds up.

    Raises:
        ValueError: another `loss_type`, or "dr_grpo" without its length.
    """
    if loss_type not in get_args(PolicyLossType):
        raise ValueError(f"loss_type must be one of {', '.join(get_args(PolicyLossType))}; got {loss_type!r}")
    mask, advantages = mask.to(log_probs.dtype), _of_rows(advantages)
    high = epsilon if epsilon_high is None else epsilon_high
    ratio = _ratio(log_probs, old_log_probs)
    losses = -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages) * mask
    if num_items is None:
        num_items = mask.sum() if loss_type == "dapo" else len(mask)
    num_items = torch.as_tensor(num_items, device=losses.device).clamp(min=1)
    if loss_type == "grpo":
        lengths = mask.sum(dim=-1, keepdim=True) if sequence_lengths is None else sequence_lengths
        losses = losses / lengths.clamp(min=1)
    elif loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError('loss_type "dr_grpo" needs max_completion_length, by which every sequence is divided')
        losses = losses / max_completion_length
    return losses.sum() / num_items


def policy_metrics(
    log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    *,
    old_log_probs: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> dict[str, Tensor]:
    """What part of the tokens is clipped, under TRL's names; scalars. The arguments are those of `policy_loss`."""
    mask, advantages = mask.to(log_probs.dtype), _of_rows(advantages)
    ratio = _ratio(log_probs.detach(), old_log_probs)
    is_low = (ratio < 1 - epsilon) & (advantages < 0)
    is_high = (ratio > 1 + (epsilon if epsilon_high is None else epsilon_high)) & (advantages > 0)
    clipped = {"low": is_low, "high": is_high, "region": is_low | is_high}
    total = mask.sum().clamp(min=1)
    return {f"clip_ratio/{name}_mean": (each * mask).sum() / total for name, each in clipped.items()}


def _of_rows(advantages: Tensor) -> Tensor:
    return advantages.unsqueeze(-1) if advantages.dim() == 1 else advantages


def _ratio(log_probs: Tensor, old_log_probs: Tensor | None) -> Tensor:
    return torch.exp(log_probs - (log_probs.detach() if old_log_probs is None else old_log_probs))

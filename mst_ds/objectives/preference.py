"""Losses of preferences between sequences, from the sums of their tokens' log-probabilities.

Names of arguments and metrics are those of TRL. Everything is per pair or per sequence: who averages knows over how
many.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimization (arXiv 2305.18290, equation 7), TRL's loss type "sigmoid".

    `-(1 - label_smoothing) log sigma(beta d) - label_smoothing log sigma(-beta d)`, with d the difference of the
    log-ratios to the reference. The smoothed form is conservative DPO, for labels that
    are wrong with that probability (E. Mitchell, "A note on DPO with noisy preferences", 2023).

    Args:
        chosen_logps, rejected_logps: (N,), the log-probability of each completion.
        ref_chosen_logps, ref_rejected_logps: (N,), those of the reference model, without a gradient.
        beta: how strongly the policy is held to the reference.
        label_smoothing: from 0 to below 0.5.

    Returns:
        (N,), a loss for each pair.

    Raises:
        ValueError: `label_smoothing` out of its range.
    """
    difference = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return _smoothed(beta * difference, label_smoothing)


def ipo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """Identity preference optimization (arXiv 2310.12036, equation 17), with log-ratios per token, as TRL has them.

    `(d - 1 / (2 beta))^2`, where beta is the paper's tau.

    Args:
        chosen_lengths, rejected_lengths: (N,), tokens of each completion.

    The other arguments and the result are those of `dpo_loss`.
    """
    chosen = (chosen_logps - ref_chosen_logps) / chosen_lengths.clamp(min=1)
    rejected = (rejected_logps - ref_rejected_logps) / rejected_lengths.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)).square()


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Simple preference optimization (arXiv 2405.14734, equation 6): no reference, log-probabilities per token.

    `-log sigma(beta (d - gamma_beta_ratio))`, with d the difference of the means; the paper's margin gamma is
    `beta * gamma_beta_ratio`.

    Args:
        chosen_lengths, rejected_lengths: (N,), tokens of each completion.

    The other arguments, the result and the errors are those of `dpo_loss`.
    """
    chosen, rejected = chosen_logps / chosen_lengths.clamp(min=1), rejected_logps / rejected_lengths.clamp(min=1)
    return _smoothed(beta * (chosen - rejected - gamma_beta_ratio), label_smoothing)


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    label: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Kahneman-Tversky optimization (arXiv 2402.01306, section 4, L_KTO): no pairs are needed.

    `weight * (1 - sigma(beta (r - kl)))` where desirable, `weight * (1 - sigma(beta (kl - r)))` where not, with r the
    log-ratio to the reference.

    Args:
        logps, ref_logps: (N,), the log-probability of each completion, and the reference's.
        label: (N,), whether the completion is desirable.
        kl: a scalar, see `kto_kl`.

    Returns:
        (N,), a loss for each sequence.
    """
    reward = beta * (logps - ref_logps - kl)
    desirable, undesirable = desirable_weight * torch.sigmoid(-reward), undesirable_weight * torch.sigmoid(reward)
    return torch.where(label.bool(), desirable, undesirable)


def kto_kl(kl_logps: Tensor, ref_kl_logps: Tensor) -> Tensor:
    """The reference point of `kto_loss`: how far the policy is from the reference, at least 0, without a gradient.

    Estimated as the paper does (arXiv 2402.01306, section 4), and TRL: the mean log-ratio of completions to which
    another prompt of the batch was given. Pass those of all ranks.

    Args:
        kl_logps, ref_kl_logps: (N,), the log-probabilities of these mismatched completions.

    Returns:
        A scalar.
    """
    return (kl_logps - ref_kl_logps).detach().mean().clamp(min=0)


def preference_metrics(
    chosen_logps: Tensor, rejected_logps: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor
) -> dict[str, Tensor]:
    """What TRL logs of pairs, under its names; (N,), without a gradient. It logs the means.

    Args:
        chosen_rewards, rejected_rewards: (N,), the implicit rewards: beta times the log-ratio to the reference, or for
            SimPO beta times the mean log-probability.
    """
    chosen, rejected = chosen_rewards.detach(), rejected_rewards.detach()
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logps.detach(),
        "logps/rejected": rejected_logps.detach(),
    }


def _smoothed(logits: Tensor, label_smoothing: float) -> Tensor:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {label_smoothing}")
    return -(1 - label_smoothing) * logsigmoid(logits) - label_smoothing * logsigmoid(-logits)

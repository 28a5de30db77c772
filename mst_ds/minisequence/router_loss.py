"""The load-balancing loss of a mixture of experts, over a sequence whose shards lie on several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def router_loss(
    router_logits: Sequence[Tensor],
    top_k: int,
    *,
    mask: Tensor | None = None,
    sum_over_ranks: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """The experts' share of tokens times their mean probability, summed (arXiv 2101.03961, equations 4 to 6).

    As transformers computes it: over the tokens of all layers together, each token counting for its `top_k` experts.
    The shares have no gradient, so they are summed over ranks first; the ranks' results then add up to the loss of the
    whole sequence, and so do their gradients.

    Args:
        router_logits: of each layer (T, E), this rank's tokens.
        top_k: experts a token goes to.
        mask: (T,), 0 on padding; None where there is none.
        sum_over_ranks: sums a tensor in place over the ranks of the sequence; None where this is the only one.

    Returns:
        This rank's part of the loss, a scalar in fp32.
    """
    num_experts = router_logits[0].shape[-1]
    counts = router_logits[0].new_zeros(num_experts + 1, dtype=torch.float32)
    probabilities = counts.new_zeros(num_experts)
    for logits in router_logits:
        weights = torch.softmax(logits, dim=-1)
        counted = torch.ones(len(logits), device=logits.device) if mask is None else mask.to(logits.device).float()
        chosen = weights.detach().topk(top_k, dim=-1).indices
        counts[:-1].scatter_add_(0, chosen.flatten(), counted.repeat_interleave(top_k).to(counts.dtype))
        counts[-1] += counted.sum()
        probabilities = probabilities + (weights.float() * counted.unsqueeze(-1)).sum(dim=0)
    if sum_over_ranks is not None:
        sum_over_ranks(counts)
    tokens = counts[-1].clamp(min=1)
    return num_experts * torch.sum(counts[:-1] / tokens * (probabilities / tokens))

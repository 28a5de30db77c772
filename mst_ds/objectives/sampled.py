"""Answers that a policy has sampled, with their advantages, as what a training step minimises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mst_ds.config import IGNORE_INDEX
from mst_ds.objectives.objective import Measured, counted_once, with_router_loss
from mst_ds.objectives.policy import PolicyLossType, policy_loss, policy_metrics
from mst_ds.objectives.sequences import Documents, num_documents
from mst_ds.rows.kinds import ADVANTAGES, OLD_LOGPS
from mst_ds.sequence_parallel import SequenceGroup


@dataclass(frozen=True)
class SampledPolicy:
    """The clipped policy loss over documents, in packed rows or a row each. An answer is what has labels in it.

    Beside what `mst_ds.data.shard` makes, a batch has "advantages", (documents,), in the same order on every rank. With
    "old_logps", (B, L), it has the log-probability of each label under the policy that sampled it; NaN, or none at all,
    stands for this policy. An item is a token for "dapo", else an answer.

    Args:
        loss_type, epsilon, epsilon_high, max_completion_length: as `policy_loss` has them.
        group: the sequence group of the model's plan; None at sp_size 1.
    """

    loss_type: PolicyLossType = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    max_completion_length: int | None = None
    group: SequenceGroup | None = None

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """Tokens of this shard; or answers, which lie on all ranks of a sequence, of which the first counts them."""
        if self.loss_type == "dapo":
            return int((batch["shift_labels"] != IGNORE_INDEX).sum())
        return counted_once(num_documents(batch), self.group)

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int) -> Measured:
        """See `Objective`. The metrics are TRL's. Collective calls within the sequence group."""
        inputs = {name: tensor for name, tensor in batch.items() if name not in (ADVANTAGES, OLD_LOGPS)}
        output = model(**inputs, return_log_probs=True)
        log_probs: Tensor = output.log_probs
        documents = Documents.of_batch(batch, self.group)
        mask = batch["shift_labels"] != IGNORE_INDEX
        lengths = documents.sums(mask)
        old = batch.get(OLD_LOGPS)
        sampled: dict[str, Any] = {
            "advantages": documents.spread(batch[ADVANTAGES].to(log_probs.dtype)),
            "old_log_probs": None if old is None else torch.where(old.isnan(), log_probs.detach(), old),
            "epsilon": self.epsilon,
            "epsilon_high": self.epsilon_high,
        }
        loss = policy_loss(
            log_probs,
            mask,
            **sampled,
            loss_type=self.loss_type,
            num_items=num_items,
            sequence_lengths=documents.spread(lengths.to(log_probs.dtype)),
            max_completion_length=self.max_completion_length,
        )
        items = lengths.sum() if self.loss_type == "dapo" else documents.count
        share = items / torch.as_tensor(num_items, device=loss.device).clamp(min=1)
        loss = with_router_loss(loss, model, output, share)
        tokens = mask.sum()
        parts = policy_metrics(log_probs, mask, **sampled)
        return Measured(loss.float(), {name: torch.stack([part * tokens, tokens]) for name, part in parts.items()})

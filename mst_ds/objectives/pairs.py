"""Preferences between pairs of documents, as what a training step minimises."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mst_ds.config import IGNORE_INDEX
from mst_ds.objectives.objective import Measured, counted_once, ranks_of, share_of_mean, with_router_loss
from mst_ds.objectives.preference import dpo_loss, ipo_loss, preference_metrics, simpo_loss
from mst_ds.objectives.sequences import Documents, num_documents
from mst_ds.sequence_parallel import SequenceGroup

REF_LOGPS = "ref_logps"


@dataclass(frozen=True)
class PairedPreferences:
    """DPO, IPO or SimPO over documents that alternate: chosen, rejected, chosen, rejected.

    Each is a document of a packed row or a row of its own, so that no two see each other. A completion is what has
    labels in it. Beside what `mst_ds.data.shard` makes, a batch has "ref_logps", (documents,): the log-probability of
    each completion under the reference model, in the same order on every rank; SimPO needs none. An item is a pair.

    Args:
        loss_type: "sigmoid" is DPO, as TRL calls it.
        beta, label_smoothing, gamma_beta_ratio: as `mst_ds.objectives.preference` has them.
        group: the sequence group of the model's plan, over which a document's log-probability is summed; None at
            sp_size 1.
    """

    loss_type: Literal["sigmoid", "ipo", "simpo"] = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma_beta_ratio: float = 0.5
    group: SequenceGroup | None = None

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """Pairs. They lie on all ranks of a sequence, of which the first counts them."""
        return counted_once(num_pairs(batch), self.group)

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int) -> Measured:
        """See `Objective`. The metrics are TRL's. Collective calls within the sequence group.

        Raises:
            ValueError: documents that are no pairs, or "ref_logps" of another number.
        """
        pairs = num_pairs(batch)
        inputs = {name: tensor for name, tensor in batch.items() if name != REF_LOGPS}
        output = model(**inputs, return_log_probs=True)
        documents = Documents.of_batch(batch, self.group)
        logps = documents.sums(output.log_probs)
        lengths = documents.sums(batch["shift_labels"] != IGNORE_INDEX)
        losses, metrics = self._of_pairs(logps, lengths, batch.get(REF_LOGPS))
        items = torch.as_tensor(num_items, device=logps.device).clamp(min=1)
        # Every rank of the group has the whole loss of these pairs, and answers for its part.
        loss = losses.sum() / (items * ranks_of(self.group))
        loss = with_router_loss(loss, model, output, pairs / items)
        return Measured(loss.float(), {name: share_of_mean(values, self.group) for name, values in metrics.items()})

    def _of_pairs(self, logps: Tensor, lengths: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair, and its metrics."""
        own, of_lengths = (logps[0::2], logps[1::2]), (lengths[0::2], lengths[1::2])
        if self.loss_type == "simpo":
            losses = simpo_loss(
                *(*own, *of_lengths),
                beta=self.beta,
                gamma_beta_ratio=self.gamma_beta_ratio,
                label_smoothing=self.label_smoothing,
            )
            means = logps / lengths.clamp(min=1)
            return losses, preference_metrics(*own, self.beta * means[0::2], self.beta * means[1::2])
        if ref_logps is None or ref_logps.shape != logps.shape:
            got = "none" if ref_logps is None else str(tuple(ref_logps.shape))
            raise ValueError(f"ref_logps must be ({len(logps)},), one for each document; got {got}")
        of_reference = ref_logps[0::2].detach(), ref_logps[1::2].detach()
        rewards = self.beta * (logps - ref_logps)
        metrics = preference_metrics(*own, rewards[0::2], rewards[1::2])
        if self.loss_type == "ipo":
            return ipo_loss(*own, *of_reference, *of_lengths, beta=self.beta), metrics
        return dpo_loss(*own, *of_reference, beta=self.beta, label_smoothing=self.label_smoothing), metrics


def num_pairs(batch: Mapping[str, Tensor]) -> int:
    """Pairs of documents of whole sequences.

    Raises:
        ValueError: one has no other.
    """
    count = num_documents(batch)
    if count % 2:
        raise ValueError(f"{count} documents are no pairs of chosen and rejected: pass them alternating")
    return count // 2

"""Preferences without pairs: single documents that are desirable or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mst_ds.objectives.objective import Measured, counted_once, ranks_of, share_of_mean, with_router_loss
from mst_ds.objectives.pairs import REF_LOGPS, num_pairs
from mst_ds.objectives.preference import kto_loss
from mst_ds.objectives.sequences import Documents
from mst_ds.rows.kinds import LABEL
from mst_ds.sequence_parallel import SequenceGroup


@dataclass(frozen=True)
class UnpairedPreferences:
    """KTO over documents that alternate: an answer, and behind the same prompt another prompt's answer.

    Of the second ones the reference point is estimated, see `kto_kl`: over the micro-batch, on all data-parallel ranks,
    as TRL does. Beside what `PairedPreferences` asks of a batch it has "label", (documents,) bool, of which the
    first ones' count. An item is an answer.

    Args:
        beta, desirable_weight, undesirable_weight: as `kto_loss` has them.
        group: see `PairedPreferences`.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    group: SequenceGroup | None = None

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """Answers. They lie on all ranks of a sequence, of which the first counts them."""
        return counted_once(num_pairs(batch), self.group)

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int) -> Measured:
        """See `Objective`. The metrics are TRL's. Collective calls within the world.

        Raises:
            ValueError: documents that do not alternate.
        """
        answers = num_pairs(batch)
        inputs = {name: tensor for name, tensor in batch.items() if name not in (REF_LOGPS, LABEL)}
        output = model(**inputs, return_log_probs=True)
        logps = Documents.of_batch(batch, self.group).sums(output.log_probs)
        ratios = logps - batch[REF_LOGPS]
        kl = _mean_of_world(ratios[1::2].detach()).clamp(min=0)
        own, ref, labels = logps[0::2], batch[REF_LOGPS][0::2], batch[LABEL][0::2]
        losses = kto_loss(
            own,
            ref,
            labels,
            kl,
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )
        items = torch.as_tensor(num_items, device=logps.device).clamp(min=1)
        loss = losses.sum() / (items * ranks_of(self.group))
        loss = with_router_loss(loss, model, output, answers / items)
        metrics = {"kl": share_of_mean(kl.expand(answers), self.group)}
        for name, mask in (("chosen", labels), ("rejected", ~labels)):
            metrics[f"rewards/{name}"] = share_of_mean(self.beta * ratios[0::2], self.group, mask)
            metrics[f"logps/{name}"] = share_of_mean(own, self.group, mask)
        return Measured(loss.float(), metrics)


def _mean_of_world(values: Tensor) -> Tensor:
    """The mean over all ranks. Those of a sequence have the same values, which changes no mean."""
    sums = torch.stack([values.sum(), torch.full((), len(values), dtype=values.dtype, device=values.device)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums[0] / sums[1].clamp(min=1)

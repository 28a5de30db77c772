"""Next-token prediction."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mst_ds.config import IGNORE_INDEX
from mst_ds.objectives.objective import Measured


class CrossEntropy:
    """The mean cross-entropy over all labels that count, which a patched model computes in chunks inside its head."""

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """Labels that count."""
        return int((batch["shift_labels"] != IGNORE_INDEX).sum())

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int) -> Measured:
        """See `Objective`."""
        return Measured(model(**batch, num_items_in_batch=num_items).loss)


CROSS_ENTROPY = CrossEntropy()

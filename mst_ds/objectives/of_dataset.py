"""Preferences of a dataset, whose documents have numbers, in place of batches that bring all that is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mst_ds.data.sharding import DOCUMENTS
from mst_ds.objectives.objective import Measured
from mst_ds.objectives.pairs import REF_LOGPS, PairedPreferences


@dataclass(frozen=True)
class DatasetPreferences:
    """Preferences between the documents of a dataset, of which a batch has the numbers in "documents".

    Args:
        pairs: what is computed of them.
        ref_logps: (documents of the dataset,), on the model's device; None where the objective needs no reference.
    """

    pairs: PairedPreferences
    ref_logps: Tensor | None

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """See `Objective`."""
        return self.pairs.num_items(batch)

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int) -> Measured:
        """See `Objective`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != DOCUMENTS}
        if self.ref_logps is not None:
            inputs[REF_LOGPS] = self.ref_logps[batch[DOCUMENTS]]
        return self.pairs.measure(model, inputs, num_items)

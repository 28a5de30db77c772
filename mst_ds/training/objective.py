"""The objective of a run, by its flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from mst_ds.data import TrainingData
from mst_ds.data.sharding import DOCUMENTS
from mst_ds.engine import Run
from mst_ds.objectives import CROSS_ENTROPY, Measured, Objective, PairedPreferences
from mst_ds.objectives.pairs import REF_LOGPS
from mst_ds.sequence_parallel import SequenceGroup
from mst_ds.training.reference import reference_logps

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class DatasetPreferences:
    """Preferences between the documents of a dataset, of which a batch has the numbers in place of `ref_logps`.

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


def objective_of(
    engine: DeepSpeedEngine, run: Run, data: TrainingData, group: SequenceGroup | None, folder: Path
) -> Objective:
    """What the run minimises, with its reference, if it has one. A collective call.

    Args:
        engine: has the weights that the run starts from, which are the reference.
        group: the ranks that share this rank's sequences.
        folder: of the run, where the reference's log-probabilities are kept.
    """
    config = run.config
    if config.objective == "sft":
        return CROSS_ENTROPY
    pairs = PairedPreferences(
        loss_type="sigmoid" if config.objective == "dpo" else config.objective,
        beta=config.beta_or_default,
        label_smoothing=config.label_smoothing,
        gamma_beta_ratio=config.gamma_beta_ratio,
        group=group,
    )
    file = folder / "reference.safetensors"
    return DatasetPreferences(pairs, reference_logps(engine, run, data, group, file) if config.has_reference else None)

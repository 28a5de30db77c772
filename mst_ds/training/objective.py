"""The objective of a run, by its flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mst_ds.data import TrainingData
from mst_ds.data.sharding import DOCUMENTS
from mst_ds.engine import Run
from mst_ds.objectives import (
    CROSS_ENTROPY,
    Measured,
    Objective,
    PairedPreferences,
    SampledPolicy,
    UnpairedPreferences,
)
from mst_ds.objectives.pairs import REF_LOGPS
from mst_ds.sequence_parallel import SequenceGroup
from mst_ds.training.reference import reference_logps

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class OfDataset:
    """An objective that needs a value of each document, for batches that have the documents' numbers.

    Args:
        objective: what is computed.
        values: by the name that the objective has for it, (documents of the dataset,), on the model's device.
    """

    objective: Objective
    values: Mapping[str, Tensor]

    def num_items(self, batch: Mapping[str, Tensor]) -> int:
        """See `Objective`."""
        return self.objective.num_items(batch)

    def measure(self, model: nn.Module, batch: Mapping[str, Tensor], num_items: Tensor | int) -> Measured:
        """See `Objective`."""
        inputs = {name: tensor for name, tensor in batch.items() if name != DOCUMENTS}
        of_documents = {name: values[batch[DOCUMENTS]] for name, values in self.values.items()}
        return self.objective.measure(model, inputs | of_documents, num_items)


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
    values = {}
    if config.has_reference:
        values[REF_LOGPS] = reference_logps(engine, run, data, group, folder / "reference.safetensors")
    for name, of_documents in data.of_documents.items():
        values[name] = torch.from_numpy(of_documents.copy()).to(engine.device)
    return OfDataset(_of_answers(run, group), values)


def _of_answers(run: Run, group: SequenceGroup | None) -> Objective:
    config = run.config
    if config.objective == "policy":
        return SampledPolicy(
            loss_type=config.loss_type,
            epsilon=config.epsilon,
            epsilon_high=config.epsilon_high,
            max_completion_length=config.seq_len,
            group=group,
        )
    if config.objective == "kto":
        return UnpairedPreferences(config.beta_or_default, config.desirable_weight, config.undesirable_weight, group)
    return PairedPreferences(
        loss_type="ipo" if config.objective == "ipo" else "simpo" if config.objective == "simpo" else "sigmoid",
        beta=config.beta_or_default,
        label_smoothing=config.label_smoothing,
        gamma_beta_ratio=config.gamma_beta_ratio,
        group=group,
    )

"""The objective of a run, by its flags."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mst_ds.data import TrainingData
from mst_ds.engine import Run
from mst_ds.objectives import CROSS_ENTROPY, DatasetPreferences, Objective, PairedPreferences
from mst_ds.sequence_parallel import SequenceGroup
from mst_ds.training.reference import reference_logps

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


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

"""What a training step minimises: per-token outputs of a model and a batch in, a loss out."""

from mst_ds.objectives.cross_entropy import CROSS_ENTROPY, CrossEntropy
from mst_ds.objectives.objective import Measured, Objective
from mst_ds.objectives.pairs import PairedPreferences
from mst_ds.objectives.policy import policy_loss, policy_metrics
from mst_ds.objectives.preference import dpo_loss, ipo_loss, kto_kl, kto_loss, preference_metrics, simpo_loss
from mst_ds.objectives.sampled import SampledPolicy
from mst_ds.objectives.sequences import Documents
from mst_ds.objectives.unpaired import UnpairedPreferences

__all__ = [
    "CROSS_ENTROPY",
    "CrossEntropy",
    "Documents",
    "Measured",
    "Objective",
    "PairedPreferences",
    "SampledPolicy",
    "UnpairedPreferences",
    "dpo_loss",
    "ipo_loss",
    "kto_kl",
    "kto_loss",
    "policy_loss",
    "policy_metrics",
    "preference_metrics",
    "simpo_loss",
]

"""What a training step minimises: per-token outputs of a model and a batch in, a loss out."""

from mst_ds.objectives.cross_entropy import CROSS_ENTROPY, CrossEntropy
from mst_ds.objectives.objective import Objective

__all__ = ["CROSS_ENTROPY", "CrossEntropy", "Objective"]

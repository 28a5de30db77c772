"""Plans in the trainers of other libraries: transformers' Trainer and those of TRL."""

from mst_ds.integrations.trainer import MstTrainerMixin

__all__ = ["MstTrainerMixin"]

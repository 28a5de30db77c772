"""The one place that puts the parts in order: what can be refused first, then the processes meet, then the weights."""

from mst_ds.engine.build import build_engine
from mst_ds.engine.epochs import with_steps_of_epochs
from mst_ds.engine.launch import Launch
from mst_ds.engine.meeting import RanksDisagreeError, meet
from mst_ds.engine.output_folder import claimed, output_folder
from mst_ds.engine.preparation import prepare
from mst_ds.engine.resume import require_same_checkpoint
from mst_ds.engine.run import Run, evaluation_batches, training_batches

__all__ = [
    "Launch",
    "RanksDisagreeError",
    "Run",
    "build_engine",
    "claimed",
    "evaluation_batches",
    "meet",
    "output_folder",
    "prepare",
    "require_same_checkpoint",
    "training_batches",
    "with_steps_of_epochs",
]

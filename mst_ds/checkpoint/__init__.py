"""Checkpoints: a training state on disk, complete or not there at all, and the way back from one into a run.

A checkpoint is a folder `step-00000050` with DeepSpeed's own files, each rank's random states, the model's config and
tokenizer, and `state.json`, which says what the run was, and size and checksum of every file. It is written beside its
place and renamed into it when all ranks have written theirs, so that a kill at any moment leaves the checkpoints before
it as they were. All ranks must see the folder.
"""

from mst_ds.checkpoint.folder import (
    EXACT_FILE,
    MODEL_FOLDER,
    STATE_FILE,
    STATES_FOLDER,
    Checkpoint,
    checkpoints_folder,
    newest_checkpoint,
    read_checkpoint,
    require_intact,
)
from mst_ds.checkpoint.identity import Identity
from mst_ds.checkpoint.load import load_best, load_checkpoint
from mst_ds.checkpoint.save import CheckpointWriter
from mst_ds.checkpoint.universal import universal_setting
from mst_ds.checkpoint.unpickling import exact_tensors, only_states

__all__ = [
    "EXACT_FILE",
    "MODEL_FOLDER",
    "STATES_FOLDER",
    "STATE_FILE",
    "Checkpoint",
    "CheckpointWriter",
    "Identity",
    "checkpoints_folder",
    "exact_tensors",
    "load_best",
    "load_checkpoint",
    "newest_checkpoint",
    "only_states",
    "read_checkpoint",
    "require_intact",
    "universal_setting",
]

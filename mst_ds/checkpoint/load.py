"""Sets an engine and its rank by a checkpoint."""

from __future__ import annotations

import pickle
import shutil
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from mst_ds.checkpoint.checksums import shared_by_ranks
from mst_ds.checkpoint.folder import STATES_FOLDER, Checkpoint, require_checksum
from mst_ds.checkpoint.random_states import random_file, seed_generators, set_random_states
from mst_ds.checkpoint.universal import UNIVERSAL_FOLDER, make_universal, mend_optimizer, without_schedule

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Checkpoint, *, seed: int) -> None:
    """Sets the engine, its optimizer and schedule, and this rank's random states. A collective call.

    Where as many ranks wrote it as there are now, the run goes on bit by bit. Else the engine must have been made with
    `universal_setting`, and random states begin anew, from `seed`, the step and the rank.

    Raises:
        OSError: a file is damaged, on the rank that raises it.
    """
    folder, rank = checkpoint.folder, dist.get_rank()
    shared_by_ranks(sorted(checkpoint.checksums), lambda name: require_checksum(checkpoint, name))
    is_same_world = checkpoint.world_size == dist.get_world_size()
    if not is_same_world and checkpoint.identity.zero_stage > 0:
        if rank == 0:
            make_universal(folder)
        dist.barrier()
        tag = UNIVERSAL_FOLDER
    else:
        tag = STATES_FOLDER
    settings = [without_schedule(group) for group in engine.optimizer.param_groups]
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
        assert path is not None, f"DeepSpeed found nothing in {folder}, whose files are all there"
        states = torch.load(folder / random_file(rank), weights_only=False) if is_same_world else None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:  # how torch says that a file is damaged
        raise OSError(f"the checkpoint {folder} could not be read: {' '.join(str(error).split())}") from error
    if tag == UNIVERSAL_FOLDER:
        mend_optimizer(engine.optimizer, settings)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder / UNIVERSAL_FOLDER)
    if states is not None:
        set_random_states(states, engine.device)
    else:
        seed_generators(seed, checkpoint.step, rank)

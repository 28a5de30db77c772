"""Sets an engine and its rank by a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from mst_ds.checkpoint.checksums import shared_by_ranks
from mst_ds.checkpoint.folder import (
    STATES_FOLDER,
    UNIVERSAL_FOLDER,
    Checkpoint,
    best_name,
    read_checkpoint,
    remove,
    require_checksum,
)
from mst_ds.checkpoint.random_states import random_file, seed_generators, set_random_states
from mst_ds.checkpoint.universal import make_universal, mend_optimizer, without_schedule
from mst_ds.checkpoint.unpickling import exact_tensors, only_states
from mst_ds.kept_in_fp32 import set_fp32_parameters

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Checkpoint, *, seed: int) -> None:
    """Sets the engine, its optimizer and schedule, and this rank's random states. A collective call.

    Where as many ranks wrote it as there are now, the run goes on bit by bit (on CPUs; on GPUs with kernels that add in
    one order). Else random states begin anew, from `seed`, the step and the rank.

    Raises:
        OSError: a file is damaged or holds what could run code, on the rank that raises it.
    """
    folder, rank = checkpoint.folder, dist.get_rank()
    shared_by_ranks(sorted(checkpoint.checksums), lambda name: require_checksum(checkpoint, name))
    is_same_world = checkpoint.world_size == dist.get_world_size()
    if not is_same_world and checkpoint.identity.zero_stage > 0:
        if rank == 0:
            with only_states(folder):
                make_universal(folder)
        dist.barrier()
        tag = UNIVERSAL_FOLDER
    else:
        tag = STATES_FOLDER
    # Every load asks for it again, so that an engine may go on from one checkpoint and end with another.
    engine._config.load_universal_checkpoint = tag == UNIVERSAL_FOLDER
    settings = [without_schedule(group) for group in engine.optimizer.param_groups]
    with only_states(folder):
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
        assert path is not None, f"DeepSpeed found nothing in {folder}, whose files are all there"
        states = torch.load(folder / random_file(rank), weights_only=True) if is_same_world else None
    if tag == UNIVERSAL_FOLDER:
        mend_optimizer(engine.optimizer, settings)
        dist.barrier()
        if rank == 0:
            remove(folder / UNIVERSAL_FOLDER)
    _apply_schedule(engine.lr_scheduler)
    if hasattr(engine.optimizer, "clip_grad"):
        # DeepSpeed takes it from the checkpoint at stages 1 and 2, but not at 0 and 3.
        engine.optimizer.clip_grad = engine.gradient_clipping()
    set_fp32_parameters(engine.module, exact_tensors(folder))
    if states is not None:
        set_random_states(states, engine.device)
    else:
        seed_generators(seed, checkpoint.step, rank)


def load_best(engine: DeepSpeedEngine, folder: Path, *, step: int, seed: int) -> Checkpoint | None:
    """Sets the engine by the checkpoint in `folder` whose evaluation has the lowest loss. A collective call.

    Args:
        step: that the engine is at: the checkpoint of it need not be loaded.

    Returns:
        The checkpoint; None where none was evaluated, and the engine is as it was.

    Raises:
        OSError: see `load_checkpoint`.
    """
    names = [best_name(folder)]
    dist.broadcast_object_list(names)
    if names[0] is None:
        return None
    try:
        best = read_checkpoint(folder / names[0])
    except ValueError as error:
        raise OSError(str(error)) from error
    if best.step != step:
        load_checkpoint(engine, best, seed=seed)
    return best


def _apply_schedule(scheduler: Any) -> None:
    """Sets the rates of the next step by the schedule that the run has now; the checkpoint's are of the one it had."""
    if isinstance(scheduler, LambdaLR):
        rates = [
            base * factor(scheduler.last_epoch)
            for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
    elif scheduler is not None and not isinstance(scheduler, LRScheduler):
        # DeepSpeed's own evaluate themselves at the step that they are told. torch's others are as the checkpoint has
        # them, see `kept_blocks`.
        scheduler.step(scheduler.last_batch_iteration)

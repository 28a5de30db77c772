"""What a run goes on from, and what it may not overwrite: found before anything else is read."""

from __future__ import annotations

from pathlib import Path

from mst_ds.checkpoint import Checkpoint, checkpoints_folder, newest_checkpoint, read_checkpoint
from mst_ds.config import AUTO, TrainConfig


def find_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """What the run goes on from.

    Raises:
        ValueError: it is damaged or of a later step than the last, or the run would overwrite what another has left in
            output_dir: checkpoints, or the model or summary of a run that is done.
    """
    newest = None if config.output_dir is None else newest_checkpoint(checkpoints_folder(config.output_dir))
    if newest is None:
        _require_unfinished(config)
    if config.resume in (None, AUTO):
        checkpoint = newest
    else:
        checkpoint = read_checkpoint(Path(config.resume).expanduser())
    if newest is not None and (
        config.resume is None or checkpoint is None or not checkpoint.folder.samefile(newest.folder)
    ):
        raise ValueError(
            f"output_dir has a checkpoint of step {newest.step}, which this run would overwrite; allowed: --resume "
            "auto, to go on from it, or another output_dir"
        )
    # How many steps epochs are is known when the data is there.
    if config.num_train_epochs is None:
        require_not_beyond(config, checkpoint)
    return checkpoint


def require_not_beyond(config: TrainConfig, checkpoint: Checkpoint | None) -> None:
    """Refuse to go on from a step after the last one.

    Raises:
        ValueError: the checkpoint is of such a step.
    """
    if checkpoint is not None and checkpoint.step > config.max_steps:
        raise ValueError(
            f"max_steps is {config.max_steps}, but {checkpoint.folder} is of step {checkpoint.step}; allowed: "
            f"{checkpoint.step} or more"
        )


def require_same_checkpoint(config: TrainConfig, found: Checkpoint | None) -> None:
    """Look again, when the folder is this run's alone: until then another one may have gone on in it.

    Raises:
        ValueError: there is another checkpoint to go on from than `find_checkpoint` found; or see there.
    """
    now = find_checkpoint(config)
    steps = [None if each is None else each.step for each in (found, now)]
    if steps[0] != steps[1]:
        raise ValueError(
            f"output_dir had {_described(steps[0])} when this run began, and now has {_described(steps[1])} of another "
            "run; allowed: the same command again, which goes on from there"
        )


def _described(step: int | None) -> str:
    return "no checkpoint" if step is None else f"a checkpoint of step {step}"


def _require_unfinished(config: TrainConfig) -> None:
    if config.output_dir is None:
        return
    folder = Path(config.output_dir).expanduser()
    for name in ("model", "summary.json"):
        if (folder / name).exists():
            raise ValueError(
                f"output_dir has the {name} of a run that is done, which this run would overwrite, and no checkpoint "
                "to go on from; allowed: another output_dir, or an empty one"
            )

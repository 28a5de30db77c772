"""DeepSpeed's universal checkpoint: from as many ranks as wrote one to any other number."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mst_ds.checkpoint.folder import STATES_FOLDER, UNIVERSAL_FOLDER, UNIVERSAL_NOTE, Checkpoint, remove


def universal_setting(checkpoint: Checkpoint | None, world_size: int) -> dict[str, Any]:
    """What DeepSpeed's JSON needs besides, for an engine that goes on from `checkpoint`."""
    if checkpoint is None or checkpoint.world_size == world_size or checkpoint.identity.zero_stage == 0:
        return {}
    return {"checkpoint": {"load_universal": True}}


def make_universal(folder: Path) -> None:
    """DeepSpeed's form of a checkpoint for any number of ranks; whatever is there may be of a kill in the middle."""
    from argparse import Namespace
    from contextlib import redirect_stdout

    from deepspeed.checkpoint import ds_to_universal

    done = folder / UNIVERSAL_FOLDER
    remove(done)
    options = Namespace(
        input_folder=str(folder / STATES_FOLDER),
        output_folder=str(done),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        ds_to_universal.main(options)
    remove(folder / UNIVERSAL_NOTE)


def without_schedule(group: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of an optimizer's group that a schedule does not set."""
    return {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}


def mend_optimizer(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """DeepSpeed 0.19.8, at stage 3, gives every group the settings of the first, such as its weight decay, and all
    states one tensor of steps, which a fused optimizer then counts up once for each of them."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    states = getattr(optimizer, "optimizer", optimizer).state
    for state in states.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()

"""Reads tensors of a checkpoint without running anything that a file asks for."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mst_ds.checkpoint.folder import EXACT_FILE, MODEL_FOLDER

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def only_states(folder: Path) -> Iterator[None]:
    """Inside, `torch.load` makes of any file nothing but tensors, numbers, text and the classes of DeepSpeed's states.

    That holds for the calls inside DeepSpeed, too, all of which ask for the opposite: torch has a variable of the
    environment that has the last word.

    Args:
        folder: of the checkpoint that is read, for the message.

    Raises:
        OSError: a file holds something else, of which nothing has been run; or torch cannot read it.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_classes_of_states()):
            try:
                yield
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:  # how torch says that a file is damaged
                raise OSError(_explanation(error, folder)) from None
    finally:
        del os.environ[_FORCE]
        os.environ |= {name: value for name, value in before.items() if value is not None}


def exact_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors whose value or dtype DeepSpeed's files do not keep, of the checkpoint in `folder`.

    Raises:
        OSError: its file is damaged.
    """
    file = folder / MODEL_FOLDER / EXACT_FILE
    try:
        return load_file(file)
    except SafetensorError as error:
        raise OSError(f"the checkpoint's file {file} could not be read: {' '.join(str(error).split())}") from None


def _classes_of_states() -> list[Any]:
    """What DeepSpeed's own files hold beside what torch allows; classes that keep numbers."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def member(owner: Any, name: str) -> Any:
        """How some releases of Python 3.11 pickle an enum, 3.11.2 among them: `getattr` of it and a name."""
        if owner is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError("Unsupported global: GLOBAL getattr was not an allowed global")
        return ZeroStageEnum[name]

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, (member, "builtins.getattr")]


def _explanation(error: Exception, folder: Path) -> str:
    file = _refused_file(folder) if isinstance(error, pickle.UnpicklingError) else None
    if file is None:
        return f"the checkpoint {folder} could not be read: {' '.join(str(error).split())}"
    found = re.search(r"GLOBAL (\S+)", str(error))
    what = found[1] if found else "something"
    return (
        f"the checkpoint's file {file} holds {what}, which is no state of a run, and could run code; it was not run; "
        "allowed: a checkpoint as mst_ds wrote it"
    )


def _refused_file(folder: Path) -> Path | None:
    for file in sorted(folder.rglob("*.pt")):
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except pickle.UnpicklingError:
            return file
        except (RuntimeError, EOFError):
            continue  # damaged, which is another fault than the one to explain
    return None

"""A checkpoint on disk: what it has, whether all of it is there, which is the newest."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst_ds.checkpoint.checksums import checksum
from mst_ds.checkpoint.identity import Identity

STATE_FILE = "state.json"
MODEL_FOLDER = "model"
STATES_FOLDER = "states"
_PARTIAL = ".partial"
_PREFIX = "step-"
_ALLOWED = "allowed: an earlier checkpoint, which --resume auto takes where this one is removed"


@dataclass(frozen=True)
class Checkpoint:
    """A complete one.

    world_size: of the ranks that wrote it. data: the place in the data. checksums: of its files, see `save_checkpoint`.
    """

    folder: Path
    step: int
    world_size: int
    identity: Identity
    data: Mapping[str, Any]
    checksums: Mapping[str, int]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads what `folder` holds, and makes sure that all of it is there.

    Raises:
        ValueError: no checkpoint, one of another version, or a file of it is missing or has another size.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {STATE_FILE}; allowed: a folder {_PREFIX}... of a run")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        sizes: dict[str, int] = state["sizes"]
        checkpoint = Checkpoint(
            folder=folder,
            step=int(state["step"]),
            world_size=int(state["world_size"]),
            identity=Identity(**state["identity"]),
            data=dict(state["data"]),
            checksums=dict(state["checksums"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged or not of mst_ds ({reason}); {_ALLOWED}") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"the checkpoint {folder} lacks its file {name}; {_ALLOWED}")
        if path.stat().st_size != size:
            raise ValueError(f"the checkpoint's file {path} has {path.stat().st_size} of its {size} bytes; {_ALLOWED}")
    return checkpoint


def require_intact(checkpoint: Checkpoint) -> None:
    """Makes sure, in one process, that every file is as it was written.

    Raises:
        OSError: one is not.
    """
    for name in checkpoint.checksums:
        require_checksum(checkpoint, name)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The one of the last step in `folder`; None where there is none. What was not completed does not count.

    Raises:
        ValueError: see `read_checkpoint`: a damaged one is not passed over in silence.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; allowed: a folder of checkpoints there, or another output_dir")
    names = complete_names(folder)
    return read_checkpoint(folder / names[-1]) if names else None


def folder_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is until it may be at `folder`: no reader takes it for one."""
    return folder.with_name(folder.name + _PARTIAL)


def remove_unfinished(folder: Path) -> None:
    """Removes what a run that was killed during a save has left."""
    for path in folder.glob(f"{_PREFIX}*{_PARTIAL}"):
        if re.fullmatch(rf"{_PREFIX}\d{{8,}}{re.escape(_PARTIAL)}", path.name):
            shutil.rmtree(path)


def complete_names(folder: Path) -> list[str]:
    """Of the checkpoints in `folder`, by step; none where there is no such folder."""
    if not folder.is_dir():
        return []
    # Not a user's copy under a name like it.
    names = [path.name for path in folder.iterdir() if re.fullmatch(rf"{_PREFIX}\d{{8,}}", path.name) and path.is_dir()]
    return sorted(names, key=lambda name: int(name.removeprefix(_PREFIX)))


def remove_checkpoint(folder: Path) -> None:
    """Removes one checkpoint; a kill in the middle leaves an unfinished one, not a damaged one."""
    going = unfinished(folder)
    folder.replace(going)
    shutil.rmtree(going)


def require_checksum(checkpoint: Checkpoint, name: str) -> int:
    """The checksum of the file of that name.

    Raises:
        OSError: it is not the one that was written.
    """
    found = checksum(checkpoint.folder / name)
    if found != checkpoint.checksums[name]:
        raise OSError(f"the checkpoint's file {checkpoint.folder / name} is not as it was written; {_ALLOWED}")
    return found

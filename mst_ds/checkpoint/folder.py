"""A checkpoint on disk: what it has, whether all of it is there, which is the newest."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst_ds.checkpoint.checksums import checksum
from mst_ds.checkpoint.identity import Identity
from mst_ds.checkpoint.state import checked
from mst_ds.files.read_file import read_json

STATE_FILE = "state.json"
MODEL_FOLDER = "model"
STATES_FOLDER = "states"
UNIVERSAL_FOLDER = "universal"
# DeepSpeed's converter leaves it beside what it makes; nobody here reads it.
UNIVERSAL_NOTE = "latest_universal"
# In the folder of the model: tensors whose value or dtype DeepSpeed's files do not keep.
EXACT_FILE = "exact.safetensors"
_PARTIAL = ".partial"
_PREFIX = "step-"
_ALLOWED = "allowed: an earlier checkpoint, which --resume auto takes where this one is removed"


def checkpoints_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Where a run with this output folder keeps its checkpoints."""
    return Path(output_dir).expanduser() / "checkpoints"


@dataclass(frozen=True)
class Checkpoint:
    """A complete one.

    world_size: of the ranks that wrote it. data: the place in the data. checksums: of its files. eval_loss: of an
    evaluation after its step, None where there was none or the loss was not finite.
    """

    folder: Path
    step: int
    world_size: int
    identity: Identity
    data: Mapping[str, Any]
    checksums: Mapping[str, int]
    eval_loss: float | None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads what `folder` holds, and makes sure that all of it is there and nothing else.

    Raises:
        ValueError: no checkpoint, one of another version, a file of it is missing or has another size, or a file is
            there that is none of it.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {STATE_FILE}; allowed: a folder {_PREFIX}... of a run")
    try:
        state = checked(read_json(file, is_finite=False))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged or not of mst_ds ({reason}); {_ALLOWED}") from None
    sizes: dict[str, int] = state["sizes"]
    found = set(_files(folder))
    for name, size in sizes.items():
        path = folder / name
        if name not in found or not path.is_file():
            raise ValueError(f"the checkpoint {folder} lacks its file {name}; {_ALLOWED}")
        if path.stat().st_size != size:
            raise ValueError(f"the checkpoint's file {path} has {path.stat().st_size} of its {size} bytes; {_ALLOWED}")
    # Who reads a folder may take whatever lies in it: DeepSpeed looks for states by a pattern.
    for name in sorted(found - sizes.keys() - {STATE_FILE}):
        raise ValueError(f"{folder / name} is not of the checkpoint that it lies in; allowed: the folder without it")
    return Checkpoint(
        folder=folder,
        step=state["step"],
        world_size=state["world_size"],
        identity=Identity(**state["identity"]),
        data=state["data"],
        checksums=state["checksums"],
        eval_loss=state["eval_loss"],
    )


def _files(folder: Path) -> Iterator[str]:
    """Names of all that is no folder, a link to one included; not of the universal form, which is made anew."""
    for root, folders, files in os.walk(folder):
        inside = Path(root).relative_to(folder)
        if not inside.parts and UNIVERSAL_FOLDER in folders:
            folders.remove(UNIVERSAL_FOLDER)
        if not inside.parts and UNIVERSAL_NOTE in files:
            files.remove(UNIVERSAL_NOTE)
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        yield from ((inside / name).as_posix() for name in files + links)


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
    if os.path.lexists(folder) and not folder.is_dir():
        what = "a file" if folder.exists() else "a link that leads nowhere"
        raise ValueError(f"{folder} is {what}; allowed: a folder of checkpoints there, or another output_dir")
    names = complete_names(folder)
    return read_checkpoint(folder / names[-1]) if names else None


def best_name(folder: Path) -> str | None:
    """Of the checkpoint in `folder` whose evaluation has the lowest loss, of equal ones the first; None where none has
    one. A damaged checkpoint does not count.
    """
    losses = {}
    for name in complete_names(folder):
        with contextlib.suppress(ValueError, OSError):
            loss = read_checkpoint(folder / name).eval_loss
            if loss is not None:
                losses[name] = loss
    return min(losses, key=losses.__getitem__, default=None)


def folder_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def unfinished(folder: Path) -> Path:
    """Where a checkpoint is until it may be at `folder`: no reader takes it for one."""
    return folder.with_name(folder.name + _PARTIAL)


def remove_unfinished(folder: Path) -> None:
    """Removes what a run that was killed during a save has left."""
    for path in folder.glob(f"{_PREFIX}*{_PARTIAL}"):
        if re.fullmatch(rf"{_PREFIX}\d{{8,}}{re.escape(_PARTIAL)}", path.name):
            remove(path)


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
    remove(going)


def remove(path: Path) -> None:
    """Removes a folder with all that is in it, or a file; of a link the link, not what it leads to."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)


def require_checksum(checkpoint: Checkpoint, name: str) -> int:
    """The checksum of the file of that name.

    Raises:
        OSError: it is not the one that was written.
    """
    found = checksum(checkpoint.folder / name)
    if found != checkpoint.checksums[name]:
        raise OSError(f"the checkpoint's file {checkpoint.folder / name} is not as it was written; {_ALLOWED}")
    return found

"""Files that ship with the package: DeepSpeed JSONs, sweeps, and the scripts that srun starts."""

from __future__ import annotations

import os
from pathlib import Path

from mst_ds.files.read_file import existing_file, expanded

_PACKAGE = Path(__file__).parents[1]
# In a checkout they stand at the root, where commands name them; setup.py has a wheel take them into the package.
_IN_CHECKOUT = {"ds_configs": "ds_configs", "sweeps": "launch/sweeps", "slurm": "slurm"}


def shipped_folder(kind: str) -> Path:
    """The folder of "ds_configs", "sweeps" or "slurm", in an installed package or in a checkout."""
    installed = _PACKAGE / kind
    return installed if installed.is_dir() else _PACKAGE.parent / _IN_CHECKOUT[kind]


def existing_or_shipped_file(given: str | os.PathLike[str], name: str, kind: str, what: str) -> Path:
    """The file that the user means: where it is not there, the shipped one that is called so, a bare name.

    Args:
        name: what the file was given as.
        kind: see `shipped_folder`.
        what: how such a file is called.

    Raises:
        ValueError: it is neither there nor shipped, or no file of ours can be called so.
    """
    shipped = {path.name: path for path in sorted(shipped_folder(kind).glob("*.[jy]*"))}
    if os.fspath(given) in shipped and not expanded(given, name).is_file():
        return shipped[os.fspath(given)]
    return existing_file(given, name, f"an existing {what}, or one that ships: {', '.join(shipped)}")

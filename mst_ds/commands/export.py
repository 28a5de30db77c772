"""Turn a checkpoint into a Hugging Face folder: mst-export runs/mine models/mine

Takes the folder of a checkpoint, or of a run, whose newest it then is. Needs no accelerator, and the memory of the
weights in fp32. The exit code is 2, with one line on stderr, for what cannot be exported.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mst_ds.checkpoint import Checkpoint, checkpoints_folder, newest_checkpoint, read_checkpoint
from mst_ds.command_line.entry_point import REQUEST_ERRORS, refuse, run_command
from mst_ds.command_line.flags import OneLineParser
from mst_ds.files.read_file import expanded


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("source", type=Path, help="Folder of a checkpoint, or output_dir of a run.")
    parser.add_argument("folder", type=Path, help="Where the model goes: a folder that is not there yet, or empty.")
    parser.add_argument(
        "--merge_adapter", action="store_true", help="Merge a run's adapters into the weights of its model."
    )
    try:
        options = parser.parse_args(argv)
        folder = expanded(options.folder, "folder")
        checkpoint = _find(expanded(options.source, "source"))
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty; allowed: a new folder")
        place = folder.resolve()
        if place.is_mount() or place == Path.cwd():
            # The model is renamed into its place.
            raise ValueError(f"{folder} is where a disk is mounted, or where you are; allowed: a new folder below it")
        if checkpoint.folder.resolve() in place.parents:
            raise ValueError(
                f"{folder} is in the checkpoint, which would be damaged by it; allowed: a folder elsewhere"
            )
        # From here on imports take seconds.
        from mst_ds.checkpoint.export import export_checkpoint

        export_checkpoint(checkpoint, folder, merge_adapter=options.merge_adapter)
    except REQUEST_ERRORS as error:
        return refuse("mst-export", error)
    print(f"step {checkpoint.step} of {checkpoint.folder} is the model in {folder}")
    return 0


def _find(source: Path) -> Checkpoint:
    checkpoint = newest_checkpoint(checkpoints_folder(source))
    return read_checkpoint(source) if checkpoint is None else checkpoint


def cli() -> int:
    """The command of a process; returns its exit code."""
    return run_command("mst-export", main)


if __name__ == "__main__":
    sys.exit(cli())

"""Runs a command, and ends it with all that it started when who asked for it is gone: guard.py <pid> command ...

A sweep that is killed has no time to end its ranks, and DeepSpeed's launcher would let them go on. This is a program of
its own, which imports nothing of the project.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

import psutil

_LOOK_SECONDS = 0.5


def main(argv: Sequence[str]) -> int:
    """Returns the command's exit code, as a shell does."""
    parent, *command = argv
    process = subprocess.Popen(command)
    while os.getppid() == int(parent):
        with contextlib.suppress(subprocess.TimeoutExpired):
            exit_code = process.wait(timeout=_LOOK_SECONDS)
            return exit_code if exit_code >= 0 else 128 - exit_code
    kill_tree(process)
    return 1


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all below it, at once."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        # Listed before any is gone: an orphan's parent is another.
        for each in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

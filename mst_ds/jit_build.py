"""Has DeepSpeed compile what it needs on a CPU, in a way that survives a process that is killed in the middle."""

from __future__ import annotations

import os
from pathlib import Path

import deepspeed
from deepspeed.accelerator import get_accelerator
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory

_SHARED_MEMORY = Path("/dev/shm")


def build_shared_memory_collective() -> None:
    """Compile, or load, the collective that `deepspeed.init_distributed` wants; accelerators have none.

    torch guards a build by a lock file. A process that is killed leaves it behind, and every later one waits for it for
    ever, without a word. Here one process at a time builds, under a lock of the kernel's, which dies with its holder:
    whoever has that and still finds the file knows that nobody will remove it.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with FileLock(folder / "mst_ds.lock"):
        (folder / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def unlink_shared_memory(rank: int) -> None:
    """Takes the name off the buffer of this rank's collective, which stays as long as a process has it open.

    DeepSpeed does so when the process ends in peace. One that is killed would leave 66 MiB of memory behind, and to a
    later run with the same address and port the state of a dead one.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    (_SHARED_MEMORY / name).unlink(missing_ok=True)

"""Has DeepSpeed compile what it needs in a way that survives a process that is killed in the middle."""

from __future__ import annotations

import functools
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.op_builder.builder import OpBuilder
from filelock import FileLock
from torch.utils.cpp_extension import _get_build_directory

from mst_ds.command_line.entry_point import RequestError


def guard_builds() -> None:
    """From here on this process compiles, or loads, each of DeepSpeed's operators under a lock of the kernel's.

    torch guards a build by a lock file. A process that is killed leaves it behind, and every later one waits for it for
    ever, without a word. Here one process at a time builds, under a lock that dies with its holder: whoever has that
    and still finds the file knows that nobody will remove it. DeepSpeed decides which operators a run needs (those of
    an optimizer, of NVMe, of its CPU backend), and when; all come through one method.
    """
    build: Any = OpBuilder.jit_load
    if hasattr(build, "__wrapped__"):
        return

    @functools.wraps(build)
    def guarded(builder: OpBuilder, *args: Any, **kwargs: Any) -> Any:
        _find_ninja()
        folder = Path(_get_build_directory(builder.name, verbose=False))
        with FileLock(folder / "mst_ds.lock"):
            (folder / "lock").unlink(missing_ok=True)
            if not any(folder.glob("*.so")):
                print(f"DeepSpeed's {builder.name} is compiled, once on this machine: about a minute", flush=True)
            return build(builder, *args, **kwargs)

    OpBuilder.jit_load = guarded


def build_shared_memory_collective() -> None:
    """Compile, or load, the collective that `deepspeed.init_distributed` wants; accelerators have none.

    Before processes meet: a rank that compiles would have the others wait in a collective.
    """
    guard_builds()
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        builder.load(verbose=False)


def _find_ninja() -> None:
    """torch looks for it on the PATH, which has not the environment's programs where that was not activated.

    Raises:
        RequestError: it is nowhere.
    """
    if shutil.which("ninja") is not None:
        return
    programs = Path(sys.executable).parent
    if not os.access(programs / "ninja", os.X_OK):
        raise RequestError(
            f"ninja, with which DeepSpeed compiles its operators, is neither on the PATH nor in {programs}; "
            "allowed: pip install ninja"
        )
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}{os.pathsep}{programs}".lstrip(os.pathsep)


def unlink_shared_memory(rank: int) -> None:
    """Takes the name off the buffer of this rank's collective, which stays as long as a process has it open.

    DeepSpeed does so when the process ends in peace. One that is killed would leave 66 MiB of memory behind, and to a
    later run with the same address and port the state of a dead one.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)

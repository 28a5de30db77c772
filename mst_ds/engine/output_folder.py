"""The folder that a run writes to, which is its alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from mst_ds.config import TrainConfig

_LOCK = ".lock"


def output_folder(config: TrainConfig) -> Path:
    """The user's, or one named by the time, which may be another on each rank."""
    return Path(config.output_dir or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}").expanduser()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Makes the folder, and makes it this run's alone: the kernel's lock ends with its holder.

    Where the context ends, or SIGTERM the process, before the run has written anything, the folder is gone again. Other
    handlers of the signal may come and go within.

    Raises:
        ValueError: another run has it, or it cannot be made.
    """
    is_new = not folder.exists()
    lock = FileLock(folder / _LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"output_dir {str(folder)!r} is that of a run which is going on; allowed: another output_dir"
        ) from None
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be made: {error.strerror}") from None

    def give_back() -> None:
        with suppress(OSError):
            if is_new and {path.name for path in folder.iterdir()} <= {_LOCK}:
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()

    def end(number: int, frame: FrameType | None) -> None:
        give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        give_back()
        lock.release()

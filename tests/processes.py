"""Processes beside the test's own: how they are run, where they can meet, and whether they have ended."""

from __future__ import annotations

import os
import resource
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]

_held: list[socket.socket] = []


def run(command: list[str], *, limit: float) -> subprocess.CompletedProcess[str]:
    """Run in the project's folder. After `limit` seconds it is stopped with all that it has started."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{shlex.join(command)} did not end within {limit} s:\n{output}")
    return subprocess.CompletedProcess(command, process.returncode, output)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """A file may have no more bytes than the limit; writing more is an error, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def free_port() -> str:
    """A port that stays this process' to give away: it is bound as long as the process lives, so that no other test
    and no connection gets it before the ranks are there. Who listens with SO_REUSEADDR, as torch's store, still can."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    _held.append(holder)
    return str(holder.getsockname()[1])


def has_ended(process: psutil.Process) -> bool:
    """Whether or not the parent that it has now has seen it: an orphan's, in a container, may never look."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def assert_ended(processes: Iterable[psutil.Process], *, limit: float = 60) -> None:
    """Soon: who kills a process seldom waits for it."""
    deadline = time.monotonic() + limit
    while alive := [process for process in processes if not has_ended(process)]:
        assert time.monotonic() < deadline, f"not ended within {limit} s: {alive}"
        time.sleep(0.01)  # looks again, until they have

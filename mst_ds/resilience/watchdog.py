"""Ends this process soon after another rank of its node, or the launcher, has ended.

A collective that a dead rank will never join can wait for as long as its timeout, and DeepSpeed's launcher gives each
rank half a minute, one after another. Ranks of other nodes are the scheduler's to end: its step fails when this node's
ranks do.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from types import TracebackType

import psutil
import torch.distributed as dist

from mst_ds.command_line.exit_protocol import EXIT_FAILED, TRAIN_COMMAND, another_rank_ended, error_line


class Watchdog:
    """Watches while its context lasts, in a thread; the context is a collective, at both ends.

    Processes that cannot be seen from here, as in a container of their own, are not watched, nor is what started a run
    of one rank, which may be a shell that is left.

    Args:
        look_seconds: from one look at the others to the next.
        grace_seconds: what an error of this rank's own, with more to say, has time for.
    """

    def __init__(self, *, look_seconds: float = 1.0, grace_seconds: float = 15.0) -> None:
        self._look_seconds, self._grace_seconds = look_seconds, grace_seconds
        self._stop = threading.Event()
        self._ranks: dict[int, psutil.Process] = {}
        self._launchers = _launchers() if dist.get_world_size() > 1 else []

    def __enter__(self) -> Watchdog:
        own = psutil.Process()
        mine = socket.gethostname(), own.pid, own.create_time()
        of_ranks = [mine] * dist.get_world_size()
        dist.all_gather_object(of_ranks, mine)
        for rank, (host, pid, created) in enumerate(of_ranks):
            if host == mine[0] and psutil.pid_exists(pid) and rank != dist.get_rank():
                process = psutil.Process(pid)
                if process.create_time() == created:
                    self._ranks[rank] = process
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            # Nobody ends before all have stopped watching.
            dist.barrier()
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(self._look_seconds):
            ended = self._ended()
            if ended is None:
                continue
            if not self._stop.wait(self._grace_seconds):
                try:
                    print(error_line(TRAIN_COMMAND, ended, rank=dist.get_rank()), file=sys.stderr, flush=True)
                finally:  # whoever read that may be gone, too
                    os._exit(EXIT_FAILED)

    def _ended(self) -> str | None:
        if not all(map(_is_alive, self._launchers)):
            return "the process that started this one has ended"
        gone = [rank for rank, process in self._ranks.items() if not _is_alive(process)]
        return another_rank_ended(f"rank {gone[0]}") if gone else None


def _launchers() -> list[psutil.Process]:
    """What started this rank, and, with DeepSpeed's launcher, what started that: it can be ended without its child."""
    parent = psutil.Process().parent()
    if parent is None:
        return []
    above = parent.parent() if "deepspeed.launcher.launch" in parent.cmdline() else None
    return [parent] if above is None else [parent, above]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False

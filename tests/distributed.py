"""Run a function on several gloo ranks, with a limit after which a hang becomes a failure."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from processes import free_port


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, limit: float = 200, fresh: bool = False
) -> list[Any]:
    """Call `function(rank, *args)` on each of `world_size` processes that share a gloo group; return the results.

    The processes are kept for the next call with the same world size, because starting them takes longer than most
    tests. After a failure they are killed, so that none inherits a broken group.

    Args:
        fresh: use processes that have done nothing before, and end them.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or did not end within `limit` seconds.
    """
    ranks = (None if fresh else _kept.pop(world_size, None)) or _Ranks(world_size)
    try:
        results = ranks.call(function, args, limit)
    except BaseException:
        ranks.kill()
        raise
    if fresh:
        ranks.kill()
    else:
        _kept[world_size] = ranks
    return results


class _Ranks:
    """Processes that wait for functions to call."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.port = free_port()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], limit: float) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((sys.path, pickle.dumps((function, args))))
        results: dict[int, Any] = {}
        deadline = time.monotonic() + limit
        while len(results) < len(self.pipes):
            pending = {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in results}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(pending.values())} did not end within {limit} s"
            for pipe in ready:
                rank = pending[pipe]
                try:
                    failure, results[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    raise AssertionError(f"rank {rank} died") from None
                assert failure is None, f"rank {rank} failed:\n{failure}"
        return [results[rank] for rank in range(len(self.pipes))]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        # DeepSpeed's collective leaves its buffers where it is killed, 66 MiB a rank.
        for buffer in Path("/dev/shm").glob(f"deepspeed_*_{self.port}_*"):
            buffer.unlink(missing_ok=True)


_kept: dict[int, _Ranks] = {}


@atexit.register
def _kill_kept() -> None:
    for ranks in _kept.values():
        ranks.kill()


def _serve(rank: int, world_size: int, port: str, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
    while True:
        sys.path[:], job = pipe.recv()
        try:
            function, args = pickle.loads(job)
            # By value: torch's own way of sending tensors needs both processes to live on.
            pipe.send_bytes(pickle.dumps((None, function(rank, *args))))
        except BaseException:
            pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))

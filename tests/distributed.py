"""Run a function on several gloo ranks, with a limit after which a hang becomes a failure."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, limit: float = 240) -> list[Any]:
    """Call `function(rank, *args)` on `world_size` fresh processes that share a gloo group; return what each returned.

    Raises:
        AssertionError: a rank raised (with its traceback), died, or did not end within `limit` seconds. The other ranks
            are killed at once.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(function, rank, world_size, port, sender, args), daemon=True)
        process.start()
        sender.close()
        pipes.append(receiver)
        processes.append(process)
    try:
        return _collect(pipes, limit)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], limit: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + limit
    while len(results) < len(pipes):
        pending = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"ranks {sorted(pending.values())} did not end within {limit} s"
        for pipe in ready:
            rank = pending[pipe]  # type: ignore[index]
            try:
                failure, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            assert failure is None, f"rank {rank} failed:\n{failure}"
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    pipe: Connection,
    args: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    torch.set_num_threads(1)
    try:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world_size)
        # By value: torch's own way shares memory with a process that is about to end.
        pipe.send_bytes(pickle.dumps((None, function(rank, *args))))
    except BaseException:
        pipe.send_bytes(pickle.dumps((traceback.format_exc(), None)))

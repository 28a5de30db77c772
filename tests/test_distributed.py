"""The harness itself: a rank that fails, dies or hangs fails the test, quickly and by name."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks


def add_up(rank: int, offset: int) -> float:
    value = torch.tensor(float(rank + offset))
    dist.all_reduce(value)
    return value.item()


def raise_on_one(rank: int) -> None:
    if rank == 1:
        raise RuntimeError("broken on purpose")
    dist.barrier()


def die_on_one(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def hang_on_one(rank: int) -> None:
    if rank == 1:
        signal.pause()


def test_results_come_by_rank_and_the_next_call_gets_a_sound_group() -> None:
    assert run_ranks(add_up, 2, 1) == [3.0, 3.0]
    with pytest.raises(AssertionError, match=r"rank 1 failed:(.|\n)*broken on purpose"):
        run_ranks(raise_on_one, 2)
    assert run_ranks(add_up, 2, 2) == [5.0, 5.0]


def test_a_dead_rank_is_named() -> None:
    # Its peer may notice the broken connection first.
    with pytest.raises(AssertionError, match=r"rank 1 died|rank 0 failed"):
        run_ranks(die_on_one, 2)


def test_a_hang_is_a_failure() -> None:
    run_ranks(add_up, 2, 0)  # so that the limit is not spent on starting
    with pytest.raises(AssertionError, match=r"ranks \[1\] did not end within 3 s"):
        run_ranks(hang_on_one, 2, limit=3)

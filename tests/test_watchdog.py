"""A rank does not outlive the others of its node, even where it waits for none of them."""

from __future__ import annotations

import multiprocessing
import os
import threading

import pytest
import torch.distributed as dist
from processes import free_port

from mst_ds.resilience.watchdog import Watchdog


def rank_of_two(rank: int, port: str, ends_early: bool) -> None:
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    with Watchdog(look_seconds=0.05, grace_seconds=0.2):
        if ends_early and rank == 1:
            os._exit(3)
        if ends_early:
            threading.Event().wait()  # as in a collective that never ends
    if rank == 0:
        # Longer than the watchdog would need to find that the other has ended, which it may now.
        threading.Event().wait(1)


@pytest.mark.parametrize(("ends_early", "codes"), [(True, [1, 3]), (False, [0, 0])])
def test_a_rank_ends_with_the_others(capfd: pytest.CaptureFixture[str], ends_early: bool, codes: list[int]) -> None:
    context, port = multiprocessing.get_context("spawn"), free_port()
    ranks = [context.Process(target=rank_of_two, args=(rank, port, ends_early), daemon=True) for rank in (0, 1)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join(timeout=200)
    assert [each.exitcode for each in ranks] == codes
    said = "mst-train: error: rank 0: another rank has ended, whose error tells why (rank 1)" in capfd.readouterr().err
    assert said == ends_early

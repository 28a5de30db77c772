"""Threads of a rank for an optimizer on the CPU."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

import torch

_THREADS = "OMP_NUM_THREADS"


def share_cores(ranks: int, environment: MutableMapping[str, str] = os.environ) -> None:
    """Give DeepSpeed's optimizers on the CPU this rank's part of the cores, unless the user has said how many.

    They are loops of OpenMP, which by itself starts in every rank a thread for each core. The variable is read by an
    OpenMP library that is loaded from now on; that of torch is loaded, and an optimizer may use either.

    Args:
        ranks: of this node.
    """
    # torchrun sets 1 where the user has set nothing.
    is_of_torchrun = "TORCHELASTIC_RUN_ID" in environment and environment.get(_THREADS) == "1"
    if _THREADS in environment and not is_of_torchrun:
        return
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment[_THREADS] = str(threads)
    torch.set_num_threads(threads)

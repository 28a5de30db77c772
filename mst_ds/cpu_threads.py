"""Threads of a rank for an optimizer on the CPU."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence, Set
from fractions import Fraction
from pathlib import Path

import torch
import torch.distributed as dist

_THREADS = "OMP_NUM_THREADS"
# With these OpenMP binds its threads to cores, the first one, which asks here, to one of them.
_PLACES = ("OMP_PLACES", "GOMP_CPU_AFFINITY")
_BINDS = "OMP_PROC_BIND"


def cores_of_node() -> list[Set[int]]:
    """The cores that each rank of this node may run on. A collective call of all ranks."""
    # Of the kernel that runs, whose cores containers share. Not every launcher numbers the ranks of a node in a row.
    node = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    own = node, os.sched_getaffinity(0)
    of_world: list[tuple[str, Set[int]]] = [own] * dist.get_world_size()
    dist.all_gather_object(of_world, own)
    return [cores for other, cores in of_world if other == node]


def share_cores(of_node: Sequence[Set[int]], environment: MutableMapping[str, str] = os.environ) -> None:
    """Give DeepSpeed's optimizers on the CPU this rank's part of the cores, unless the user has said how many threads
    there are, or which core each has.

    They are loops of OpenMP, which by itself starts in every rank a thread for each core. The variable is read by an
    OpenMP library that is loaded from now on; that of torch is loaded, and an optimizer may use either.

    A core is shared by the ranks that may run on it: by all of a node where nothing is bound, by those of a socket
    where ranks are bound to sockets. Where SLURM, numactl or a launcher has given each rank cores of its own, none is.

    Args:
        of_node: the cores that each rank of this node may run on, its own among them.
    """
    # torchrun sets 1 where the user has set nothing.
    is_of_torchrun = "TORCHELASTIC_RUN_ID" in environment and environment.get(_THREADS) == "1"
    if (_THREADS in environment and not is_of_torchrun) or _binds_threads(environment):
        return
    ranks_of_core = Counter(core for cores in of_node for core in cores)
    threads = max(1, int(sum(Fraction(1, ranks_of_core[core]) for core in os.sched_getaffinity(0))))
    environment[_THREADS] = str(threads)
    torch.set_num_threads(threads)


def _binds_threads(environment: Mapping[str, str]) -> bool:
    return environment.get(_BINDS, "false").lower() != "false" or any(name in environment for name in _PLACES)

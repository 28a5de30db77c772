"""Where a process stands among those that its launcher has started."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """Where the launcher put this process: its global and node-local rank, and how many there are of each."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read the variables of DeepSpeed's launcher or torchrun; without any, a single process.

        Raises:
            ValueError: a variable is not a number.
        """

        def read(*names: str, default: int) -> int:
            name = next((name for name in names if name in environment), None)
            if name is None:
                return default
            if not environment[name].isdecimal():
                raise ValueError(f"the environment variable {name} is {environment[name]!r}; allowed: a whole number")
            return int(environment[name])

        world_size = read("WORLD_SIZE", default=1)
        return cls(
            rank=read("RANK", default=0),
            world_size=world_size,
            local_rank=read("LOCAL_RANK", default=0),
            local_world_size=read("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=world_size),
        )


def stand_alone() -> None:
    """Without a launcher a run is one process: say so where DeepSpeed looks, or it would ask for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

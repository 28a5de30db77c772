"""Where a process stands among those that its launcher has started."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

_MOST_RANKS = 2**20


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
            ValueError: a variable is missing, is not a number, or does not go with the others.
        """

        def read(*names: str, default: int, least: int, most: int) -> int:
            name = next((name for name in names if name in environment), None)
            if name is None:
                return default
            text = environment[name]
            if not (text.isascii() and text.isdecimal() and len(text) < 10 and least <= int(text) <= most):
                raise ValueError(
                    f"the environment variable {name} is {text!r}; allowed: a whole number from {least} to {most}"
                )
            return int(text)

        world_size = read("WORLD_SIZE", default=1, least=1, most=_MOST_RANKS)
        local_world_size = world_size
        if "WORLD_SIZE" in environment:
            names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
            local_world_size = read(*names, default=world_size, least=1, most=world_size)
        launch = cls(
            rank=read("RANK", default=0, least=0, most=world_size - 1),
            world_size=world_size,
            local_rank=read("LOCAL_RANK", default=0, least=0, most=local_world_size - 1),
            local_world_size=local_world_size,
        )
        if "MASTER_ADDR" in environment or world_size > 1:
            for name in ("MASTER_ADDR", "MASTER_PORT"):
                if not environment.get(name):
                    raise ValueError(
                        f"the environment variable {name} is not set for {world_size} ranks; allowed: the place where "
                        "they meet, as the deepspeed launcher, torchrun or slurm/setup.sh sets it"
                    )
            read("MASTER_PORT", default=0, least=1, most=2**16 - 1)
        return launch


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


def stay_on_node(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has gloo listen on the loopback where all ranks meet there; a user's choice of the interface stays."""
    if environment["MASTER_ADDR"].startswith("127.") or environment["MASTER_ADDR"] in ("localhost", "::1"):
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), None)
        if loopback is not None:
            environment.setdefault("GLOO_SOCKET_IFNAME", loopback)

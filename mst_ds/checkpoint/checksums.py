"""Checksums of files, and the work on many files divided among ranks."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

_BLOCK_BYTES = 2**24


def checksum(path: Path) -> int:
    """CRC-32. torch checks none when it loads a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return value


def shared_by_ranks(names: list[str], of_name: Callable[[str], int]) -> dict[str, int]:
    """`of_name` of every name, each computed by one rank. A collective call; rank 0 says which names there are."""
    # A rank that lists a folder of a network itself may not see yet what another has written.
    lists = [names]
    dist.broadcast_object_list(lists)
    world_size = dist.get_world_size()
    own = {name: of_name(name) for name in lists[0][dist.get_rank() :: world_size]}
    of_ranks = [own] * world_size
    dist.all_gather_object(of_ranks, own)
    return {name: number for part in of_ranks for name, number in part.items()}

"""Where a rank stands: world = dp_size x sp_size, the ranks of a sequence group next to each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mst_ds.config import AUTO, Auto


@dataclass(frozen=True)
class Topology:
    """One rank's place in the world.

    Raises:
        ValueError: `sp_size` does not divide `world_size`, or `rank` is not in the world.
    """

    rank: int
    world_size: int
    sp_size: int

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"world_size is {self.world_size}; allowed: a whole number >= 1")
        _check_divides(self.sp_size, self.world_size)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}; allowed: 0 to {self.world_size - 1}")

    @property
    def dp_size(self) -> int:
        return self.world_size // self.sp_size

    @property
    def sp_rank(self) -> int:
        return self.rank % self.sp_size

    @property
    def dp_rank(self) -> int:
        return self.rank // self.sp_size

    @property
    def sp_ranks(self) -> tuple[int, ...]:
        """The global ranks that share this rank's sequences, in the order of their shards."""
        first = self.dp_rank * self.sp_size
        return tuple(range(first, first + self.sp_size))


def choose_sp_size(
    requested: int | Auto, *, world_size: int, num_attention_heads: int, ranks_per_node: int | None = None
) -> int:
    """The ranks that share a sequence.

    `"auto"` takes as many as possible within a node, where the all-to-all is fast: the largest divisor of the
    ranks of a node (default: of the world) that divides the world too and has a query head for each rank. A plan may
    settle on another one: `mst_ds.planner.sequence_ranks`.

    Raises:
        ValueError: a requested size does not divide `world_size`, or exceeds the number of query heads.
    """
    if requested == AUTO:
        common = math.gcd(ranks_per_node or world_size, world_size)
        return max(size for size in divisors(common) if size <= num_attention_heads)
    _check_divides(requested, world_size)
    if requested > num_attention_heads:
        allowed = [size for size in divisors(world_size) if size <= num_attention_heads]
        raise ValueError(
            f"sp_size is {requested}, but the model has {num_attention_heads} query heads and each rank "
            f"needs one; allowed: {_listed(allowed)}; nearest: {allowed[-1]}"
        )
    return requested


def _check_divides(sp_size: int, world_size: int) -> None:
    if sp_size < 1 or world_size % sp_size:
        allowed = divisors(world_size)
        nearest = min(allowed, key=lambda size: abs(size - sp_size))
        raise ValueError(
            f"sp_size is {sp_size}, which does not divide the world size {world_size}; "
            f"allowed: {_listed(allowed)}; nearest: {nearest}"
        )


def divisors(number: int) -> list[int]:
    """From 1 on."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))

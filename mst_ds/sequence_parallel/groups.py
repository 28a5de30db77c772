"""The ranks that hold the shards of one sequence, and what attention exchanges between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mst_ds.topology import Topology


class SequenceGroup(Protocol):
    """The ranks that share a sequence, in the order of their shards. Every method is a collective call."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_to_all(self, received: Tensor, send: Tensor, receive_splits: list[int], send_splits: list[int]) -> None:
        """Send to each rank its part of the flat `send`, fill the flat `received` with what each rank sends here."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, by rank; all of one shape and dtype."""

    def all_reduce(self, tensor: Tensor) -> None:
        """Replace `tensor` by its sum over the ranks."""


@dataclass(frozen=True)
class ProcessSequenceGroup:
    """A sequence group whose ranks are processes."""

    process_group: dist.ProcessGroup

    @property
    def rank(self) -> int:
        return dist.get_rank(self.process_group)

    @property
    def size(self) -> int:
        return dist.get_world_size(self.process_group)

    def all_to_all(self, received: Tensor, send: Tensor, receive_splits: list[int], send_splits: list[int]) -> None:
        dist.all_to_all_single(received, send, receive_splits, send_splits, group=self.process_group)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, tensor.contiguous(), group=self.process_group)
        return gathered

    def all_reduce(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor, group=self.process_group)


def new_sequence_group(sp_size: int) -> ProcessSequenceGroup | None:
    """Create the sequence groups and return this rank's own; None where a sequence is not sharded.

    A collective call: every rank of the world creates every group, in the same order. The group is never the world's
    own, even where it spans the world: attention's all-to-alls must not queue behind ZeRO's collectives.

    Raises:
        ValueError: no process group is initialised, or `sp_size` does not divide its size.
    """
    if sp_size == 1:
        return None
    if not dist.is_initialized():
        raise ValueError(f"sp_size {sp_size} needs torch.distributed: call deepspeed.init_distributed() first")
    topology = Topology(dist.get_rank(), dist.get_world_size(), sp_size)
    groups = [dist.new_group(list(range(first, first + sp_size))) for first in range(0, topology.world_size, sp_size)]
    return ProcessSequenceGroup(groups[topology.dp_rank])

"""The process groups whose ranks hold the shards of one sequence."""

from __future__ import annotations

import torch.distributed as dist

from mst_ds.topology import Topology


def new_sequence_group(topology: Topology) -> dist.ProcessGroup | None:
    """Create the sequence groups and return this rank's own; None where a sequence is not sharded.

    A collective call: every rank of the world creates every group, in the same order. The group is never the world's
    own, even where it spans the world: attention's all-to-alls must not queue behind ZeRO's collectives.

    Raises:
        ValueError: no process group is initialised, or it has another size or rank than `topology` says.
    """
    if topology.sp_size == 1:
        return None
    if not dist.is_initialized():
        raise ValueError(f"sp_size {topology.sp_size} needs torch.distributed: call deepspeed.init_distributed() first")
    if (dist.get_world_size(), dist.get_rank()) != (topology.world_size, topology.rank):
        raise ValueError(
            f"the plan is for rank {topology.rank} of {topology.world_size}, this process is rank {dist.get_rank()} of "
            f"{dist.get_world_size()}: call make_plan with this world_size and rank"
        )
    groups = [
        dist.new_group(list(range(first, first + topology.sp_size)))
        for first in range(0, topology.world_size, topology.sp_size)
    ]
    return groups[topology.dp_rank]

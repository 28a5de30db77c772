"""What the ranks of a run plan for together."""

from __future__ import annotations

from dataclasses import replace

import torch.distributed as dist

from mst_ds.planner import Request


def request_of_all(request: Request) -> Request:
    """The request of a rank that knows the others: each has its own device's memory, and all choose alike, for the
    slowest device, for which they wait, and the smallest host. A collective call."""
    topology = request.topology
    times = request.rates, request.times_are_known
    own = request.device_memory[topology.rank], request.host_memory, times, request.work.capability
    of_ranks = [own] * topology.world_size
    if topology.world_size > 1:
        dist.all_gather_object(of_ranks, own)
    memory, host_memory, times_of_ranks, capability = zip(*of_ranks, strict=True)
    rates, are_known = zip(*times_of_ranks, strict=True)
    slowest = min(range(len(rates)), key=lambda rank: rates[rank].flops)
    return replace(
        request,
        device_memory=memory,
        host_memory=None if None in host_memory else min(host_memory),
        rates=rates[slowest],
        times_are_known=all(are_known),
        work=replace(request.work, capability=capability[slowest]),
    )

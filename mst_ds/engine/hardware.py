"""What a rank computes with: its device, and its part of the node's memory."""

from __future__ import annotations

import torch
from deepspeed.accelerator import get_accelerator

from mst_ds.engine.launch import Launch
from mst_ds.memory.host import host_memory
from mst_ds.planner import Gpu, gpu_of_device


def has_accelerator() -> bool:
    return bool(get_accelerator().device_name() != "cpu")


def rank_device_memory(launch: Launch) -> int:
    """Bytes of this rank's device; without an accelerator the ranks of a node share its memory."""
    if has_accelerator():
        return int(get_accelerator().total_memory(launch.local_rank))
    return host_memory() // launch.local_world_size


def rank_host_memory(launch: Launch) -> int | None:
    """Bytes of the host that this rank may use; None without an accelerator, where the host is the device."""
    if not has_accelerator():
        return None
    # Not what is free now: that differs from rank to rank, but all have to keep the same. A quarter is for others.
    return host_memory() * 3 // 4 // launch.local_world_size


def rank_capability(launch: Launch) -> tuple[int, int] | None:
    """Of CUDA, of this rank's device; None where it has none."""
    return torch.cuda.get_device_capability(launch.local_rank) if get_accelerator().device_name() == "cuda" else None


def rank_gpu(launch: Launch) -> Gpu | None:
    """Whose rates predict the time of a step; None on the CPU and for what is not known."""
    if get_accelerator().device_name() != "cuda":
        return None
    return gpu_of_device(torch.cuda.get_device_name(launch.local_rank), rank_device_memory(launch))

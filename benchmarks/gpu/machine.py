"""What the session runs on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import psutil
import torch

from benchmarks.gpu.sections import Context, gib
from benchmarks.measure import outside_bytes
from benchmarks.report import where
from mst_ds.gpus import gpu_of_device

KEYS = ("where", "host_bytes", "total_bytes", "outside_bytes", "capability", "allocator", "planned_as")


def run(context: Context, results: dict[str, Any]) -> None:
    """The device, its memory and versions; on a CPU None for what only a GPU has."""
    device = context.device
    results |= {
        **dict.fromkeys(KEYS),
        "where": dict(where(device)),
        "host_bytes": psutil.virtual_memory().total,
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        gpu = gpu_of_device(properties.name, properties.total_memory)
        results |= {
            "total_bytes": properties.total_memory,
            "outside_bytes": outside_bytes(device),
            "capability": [properties.major, properties.minor],
            "planned_as": gpu.name if gpu is not None else None,
        }


def lines(results: Mapping[str, Any]) -> list[str]:
    """Device, memory and versions."""
    place = results.get("where")
    if place is None:
        return []
    shown = [f"{name} {place[name]}" for name in ("torch", "transformers", "deepspeed", "liger-kernel", "flash-attn")]
    memory = []
    if results.get("total_bytes") is not None:
        memory = [f"{gib(results['total_bytes'])}, {gib(results['outside_bytes'])} not torch's"]
    return [", ".join([place["device"], *memory]), ", ".join(shown)]

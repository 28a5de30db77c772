"""What a run runs on: its device, that one's FLOP/s and used memory, and the versions of packages."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

from mst_ds.dtypes import HALVES
from mst_ds.gpus import peak_flops_of_device

_VERSIONED_PACKAGES = ("mst_ds", "torch", "deepspeed", "transformers", "datasets")


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes that this process has needed on `device`.

    On an accelerator: the most that tensors occupied at once, as torch's allocator counted it. On the CPU:
    the process' resident set now, as not every platform keeps a peak of it.
    """
    if device.type == "cpu":
        return resident_bytes()
    return int(torch.accelerator.max_memory_allocated(device))


def reserved_bytes(device: torch.device) -> int | None:
    """Bytes of an accelerator that tensors cannot have: what is not torch's, and what its allocator held at its most
    beyond what tensors then took. None on a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    of_others = total - free - torch.cuda.memory_reserved(device)
    return of_others + torch.cuda.max_memory_reserved(device) - torch.cuda.max_memory_allocated(device)


def resident_bytes() -> int:
    """Of this process, on the host, now."""
    return int(psutil.Process().memory_info().rss)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data sheet's FLOP/s of one `device` for dense matrix products in `dtype`, None where unknown.

    Known are the common data-centre GPUs in bf16 and fp16. A MIG slice is a part of a GPU of unknown size.
    """
    if device.type != "cuda" or dtype not in HALVES:
        return None
    return peak_flops_of_device(torch.cuda.get_device_name(device))


def device_name(device: torch.device) -> str:
    """What it is called: a GPU by its maker's name, else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide what a run computes."""
    versions = {"python": platform.python_version()}
    for package in _VERSIONED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # mst_ds itself, where it runs from its source folder
            continue
    return versions

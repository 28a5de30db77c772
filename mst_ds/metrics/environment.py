"""What a run runs on: its device, that one's FLOP/s and used memory, and the versions of packages."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version

import psutil
import torch

# Dense bf16/fp16 FLOP/s of one device, from the vendors' data sheets (half of the figures that NVIDIA prints
# "with sparsity"). Matched in this order against the device's name.
_PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH[12]00 NVL\b", 835.5e12),
    (r"\bH[18]00 PCIe\b", 756.5e12),
    (r"\b(H100|H200|H800|GH200)\b", 989.5e12),
    (r"\bH20\b", 148e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bA40\b", 149.7e12),
    (r"\bA30\b", 165e12),
    (r"\bL40S\b", 362.05e12),
    (r"\bL40\b", 181.05e12),
    (r"\bL4\b", 121e12),
    (r"\bMI3(00|25)X\b", 1307.4e12),
)
_VERSIONED_PACKAGES = ("mst_ds", "torch", "deepspeed", "transformers", "datasets")


def peak_memory_bytes(device: torch.device) -> int:
    """Bytes that this process has needed on `device`.

    On an accelerator: the most that tensors occupied at once, as torch's allocator counted it. On the CPU:
    the process' resident set now, as not every platform keeps a peak of it.
    """
    if device.type == "cpu":
        return psutil.Process().memory_info().rss
    return int(torch.accelerator.max_memory_allocated(device))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data sheet's FLOP/s of one `device` for dense matrix products in `dtype`, None where unknown.

    Known are the common data-centre GPUs in bf16 and fp16. A MIG slice is a part of a GPU of unknown size.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name:
        return None
    return next((flops for pattern, flops in _PEAK_FLOPS if re.search(pattern, name)), None)


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

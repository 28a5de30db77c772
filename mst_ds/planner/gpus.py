"""GPUs by name: the memory that a process can have of one."""

from __future__ import annotations

from collections.abc import Mapping

from mst_ds.config import GIB, nearest

# GiB of `torch.cuda.get_device_properties(...).total_memory`, rounded down: less than the name says, which counts in
# 10^9 bytes or has not yet taken off what error correction and driver keep.
_MEMORY_GIB: Mapping[str, int] = {
    "A10G": 22,
    "A100-40GB": 39,
    "A100-80GB": 79,
    "L4": 22,
    "L40S": 44,
    "H100": 79,
    "H200": 139,
    "B200": 178,
}


def gpu_memory(name: str) -> int:
    """Bytes of a GPU, whose name may be in small letters.

    Raises:
        ValueError: not in the table.
    """
    found = _MEMORY_GIB.get(name.upper())
    if found is None:
        raise ValueError(
            f"gpu is {name!r}{nearest(name.upper(), _MEMORY_GIB)}; allowed: {', '.join(_MEMORY_GIB)}, "
            "or device_memory_gib for any other"
        )
    return found * GIB

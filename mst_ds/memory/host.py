"""The memory of this node that its ranks may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import psutil
import torch


def host_memory(process: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the ranks of this node share: all it has, or the least that a container or a batch job leaves them.

    Args:
        process: names the control groups that this process is in.
        mount: where the kernel shows control groups.
    """
    return min([psutil.virtual_memory().total, *_limits(process, mount)])


def give_back_pinned_memory() -> None:
    """Pinned blocks that nobody uses go back to the system; torch would keep them for requests of their sizes."""
    if torch.accelerator.is_available():
        # torch 2.12 has a public name for it.
        give_back = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
        if give_back is not None:
            give_back()


def _limits(process: Path, mount: Path) -> Iterator[int]:
    """Of this process' control group and of each that this one is in, in version 2 or 1 (cgroups(7))."""
    if not process.is_file():
        return
    for line in process.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            folder, name = mount, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = mount / "memory", "memory.limit_in_bytes"
        else:
            continue
        # A container may see its own group as the root, under a path that only its host has.
        inside = PurePosixPath(group).relative_to("/")
        for each in (inside, *inside.parents):
            file = folder / each / name
            if file.is_file() and (limit := file.read_text(encoding="ascii").strip()).isdecimal():
                yield int(limit)

"""What a container or a batch job leaves a node's ranks, as the kernel tells it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from mst_ds.memory.host import host_memory

NODE = psutil.virtual_memory().total
GROUP = "/slurm/job_7/step_0"


def limited(folder: Path, process: str, files: dict[str, str]) -> int:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text + "\n", encoding="ascii")
    (folder / "cgroup").write_text(process, encoding="utf-8")
    return host_memory(folder / "cgroup", folder)


VERSION_1 = f"5:cpu,cpuacct:/\n4:memory:{GROUP}\n0::/init\n"
VERSION_2 = f"0::{GROUP}\n"


@pytest.mark.parametrize(
    ("process", "files", "expected"),
    [
        (VERSION_2, {f"{GROUP[1:]}/memory.max": "max", "slurm/job_7/memory.max": "4096"}, 4096),
        (VERSION_2, {f"{GROUP[1:]}/memory.max": "2048", "slurm/job_7/memory.max": "4096"}, 2048),
        (VERSION_1, {f"memory{GROUP}/memory.limit_in_bytes": "4096"}, 4096),
        (VERSION_1, {f"memory{GROUP}/memory.limit_in_bytes": "9223372036854771712"}, NODE),
        # Inside a container.
        (VERSION_1, {"memory/memory.limit_in_bytes": "8192"}, 8192),
        (VERSION_2, {"memory.max": "8192"}, 8192),
        ("0::/../outside\n", {"memory.max": "8192"}, 8192),
        ("0::/gr\u00fcn\n", {"memory.max": "8192"}, 8192),
        # None.
        (VERSION_2, {"memory.max": "max"}, NODE),
        (VERSION_2, {}, NODE),
    ],
)
def test_the_least_limit_counts(tmp_path: Path, process: str, files: dict[str, str], expected: int) -> None:
    assert limited(tmp_path, process, files) == expected


def test_a_system_without_control_groups_has_its_memory(tmp_path: Path) -> None:
    assert host_memory(tmp_path / "none") == NODE

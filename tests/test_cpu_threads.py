"""Threads of an optimizer on the CPU: those of the OpenMP that its compiled code finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks

from mst_ds.cpu_threads import cores_of_node, share_cores

SOURCE = """
#include <omp.h>
extern "C" int threads() {
    int count = 0;
    #pragma omp parallel
    #pragma omp single
    count = omp_get_num_threads();
    return count;
}
"""
RUN = """
import ctypes, os, sys
os.sched_getaffinity = lambda pid: range(6)
from mst_ds.cpu_threads import share_cores
share_cores([range(6), range(6)])
print(ctypes.CDLL(sys.argv[1]).threads())
"""


def test_what_is_compiled_gets_the_share_of_a_rank(tmp_path: Path) -> None:
    (tmp_path / "threads.cpp").write_text(SOURCE, encoding="utf-8")
    # As DeepSpeed compiles its optimizers.
    command = ["c++", "-shared", "-fPIC", "-fopenmp", "threads.cpp", "-o", "threads.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", RUN, str(tmp_path / "threads.so")]
    assert subprocess.check_output(command, env=environment, text=True).split() == ["3"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "3"),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, "3"),
        ({"OMP_NUM_THREADS": "1"}, "1"),
        ({"OMP_NUM_THREADS": "2", "TORCHELASTIC_RUN_ID": "none"}, "2"),
        ({"OMP_PROC_BIND": "false"}, "3"),
        ({"OMP_PROC_BIND": "spread"}, None),
        ({"OMP_PLACES": "cores"}, None),
        ({"KMP_AFFINITY": "compact"}, "3"),
        ({"GOMP_CPU_AFFINITY": "0-5"}, None),
    ],
)
def test_what_the_user_has_set_stays(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str | None
) -> None:
    told: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    environment = dict(given)
    share_cores([range(6), range(6)], environment)
    assert environment.get("OMP_NUM_THREADS") == expected
    assert told == ([3] if expected == "3" else [])


# The cores of each rank of a node, of which the first asks, and its threads.
AFFINITIES = {
    "bound to nothing": ([range(8)] * 4, 2),
    "each to its own cores": ([range(8), range(8, 16), range(16, 24)], 8),
    "two ranks to a socket": ([range(4), range(4), range(4, 8), range(4, 8)], 2),
    "one to a part of the others' cores": ([range(2), range(8), range(8)], 1),
    "more ranks than cores": ([range(2)] * 3, 1),
    "thirds": ([range(6)] * 3, 2),
}


@pytest.mark.parametrize("case", AFFINITIES)
def test_a_core_is_shared_by_the_ranks_that_may_run_on_it(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    of_node, expected = AFFINITIES[case]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: of_node[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    environment: dict[str, str] = {}
    share_cores(of_node, environment)
    assert environment["OMP_NUM_THREADS"] == str(expected)


def bound_cores(rank: int) -> list[Any]:
    """On one node, and on two whose ranks a launcher has not numbered in a row."""
    nodes = ["alone"] * 3, ["even", "odd", "even"]
    found = []
    for of_ranks in nodes:
        with (
            patch.object(os, "sched_getaffinity", lambda pid: {10 + rank}),
            patch.object(Path, "read_text", lambda path, encoding, of_ranks=of_ranks: of_ranks[rank]),
        ):
            found.append(cores_of_node())
    return found


def test_ranks_tell_their_neighbours_where_they_may_run() -> None:
    everywhere, even = [{10}, {11}, {12}], [{10}, {12}]
    assert run_ranks(bound_cores, 3) == [[everywhere, even], [everywhere, [{11}]], [everywhere, even]]

"""Threads of an optimizer on the CPU: those of the OpenMP that its compiled code finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mst_ds.cpu_threads import share_cores

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
share_cores(2)
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
    ],
    ids=["the launcher", "torchrun", "the user", "the user of torchrun"],
)
def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str) -> None:
    told: list[int] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6))
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    environment = dict(given)
    share_cores(2, environment)
    assert environment["OMP_NUM_THREADS"] == expected
    assert told == ([3] if expected == "3" else [])

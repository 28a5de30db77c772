"""Compiles `device_guard.cpp` and runs a script with it: `python tests/fake_cuda/fake_process.py [case ...]`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_PROJECT = _HERE.parents[1]
_TORCH = Path(torch.__file__).parent
CACHE = _PROJECT / ".pytest_cache" / "fake_cuda"


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++"))


def library(cache: Path) -> Path:
    """The compiled library, made once for each torch and each source.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    source = _HERE / "device_guard.cpp"
    made_of = f"{torch.__version__} {torch.version.git_version} ".encode() + source.read_bytes()
    built = cache / f"libfakecuda-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = built.with_suffix(f".{os.getpid()}")
        include = _TORCH / "include"
        paths = [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}", f"-L{_TORCH / 'lib'}"]
        options = [
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        ]
        found = compiler()
        assert found is not None
        subprocess.run([found, *options, *paths, source, "-o", fresh, "-ltorch_cpu", "-lc10"], check=True)
        fresh.replace(built)
    return built


def run(cases: Sequence[str], cache: Path = CACHE) -> dict[str, dict[str, Any]]:
    """What `fake_step.py` says of each case, in a process of its own.

    Raises:
        subprocess.CalledProcessError: it ends early.
    """
    environment = os.environ | {
        "LD_PRELOAD": str(library(cache)),
        "LD_LIBRARY_PATH": _first(_TORCH / "lib", "LD_LIBRARY_PATH"),
        "PYTHONPATH": _first(_PROJECT, "PYTHONPATH"),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(_HERE / "fake_step.py"), *cases]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {found.pop("case"): found for found in map(json.loads, output.splitlines())}


def _first(path: Path, variable: str) -> str:
    """The variable's paths, after `path`."""
    return os.pathsep.join(filter(None, [str(path), os.environ.get(variable)]))


if __name__ == "__main__":
    for case, found in run(sys.argv[1:]).items():
        print(case, json.dumps(found, indent=2))

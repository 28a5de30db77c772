"""The package as others install it: a wheel, in a folder that is no checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT

# Asked of an installed package: what it finds of what it ships, and the commands that it has.
LOOK = """
import importlib.metadata, json, os, sys
from mst_ds.config import DEFAULT_DS_CONFIG
from mst_ds.model_shape.configs import shipped_model_config
from mst_ds.scaling import read_sweep
from mst_ds.files.shipped import shipped_folder
from mst_ds.zero import load_ds_config
distribution = importlib.metadata.distribution("mst_ds")
commands = [point for point in distribution.entry_points if point.group == "console_scripts"]
print(json.dumps({
    "default": load_ds_config(DEFAULT_DS_CONFIG) == load_ds_config("zero3_mst.json"),
    "ds_configs": {name: load_ds_config(name) for name in sys.argv[1].split()},
    "sweeps": [len(read_sweep(name).points) > 0 for name in sys.argv[2].split()],
    "scripts": [os.access(shipped_folder("slurm") / name, os.X_OK) for name in ("rank.sh", "stoppable.sh")],
    "model_config": (shipped_model_config("small_llama") / "config.json").is_file(),
    "commands": {point.name: point.load().__module__ for point in commands},
    "description": distribution.metadata.get_payload() or distribution.metadata["Description"],
    "files": [module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "mst_ds"],
}))
"""
PLAN = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print(*(module.__file__ for name, module in sys.modules.items() if name.partition(".")[0] == "mst_ds"),
        sep="\\n", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a wheel of this checkout has, and nothing that it needs."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    # Setuptools builds beside the source, and takes what an earlier build has left there.
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("mst_ds", "ds_configs", "launch", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)], folder)
    (wheel,) = folder.glob("*.whl")
    run([*pip, "install", "--no-deps", "--no-index", "--target", str(folder / "installed"), str(wheel)], folder)
    shutil.rmtree(source)
    return folder / "installed"


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def assert_all_in(files: list[str], installed: Path) -> None:
    assert files
    assert [file for file in files if not Path(file).is_relative_to(installed)] == []


def test_what_ships_is_found(installed: Path, tmp_path: Path) -> None:
    ds_configs = {path.name: path for path in (ROOT / "ds_configs").glob("*.json")}
    sweeps = [path.name for path in (ROOT / "launch" / "sweeps").glob("*.yaml")]
    command = [sys.executable, "-c", LOOK, " ".join(ds_configs), " ".join(sweeps)]
    found = json.loads(run(command, tmp_path, PYTHONPATH=str(installed)).stdout)
    assert found["default"]
    for name, path in ds_configs.items():
        assert found["ds_configs"][name] == json.loads(path.read_text(encoding="utf-8"))
    assert found["sweeps"] == [True] * len(sweeps) != []
    assert found["scripts"] == [True, True]
    assert found["model_config"]
    names = ("train", "plan", "preflight", "export", "scale")
    assert found["commands"] == {f"mst-{name}": f"mst_ds.commands.{name}" for name in names}
    assert all((installed / "bin" / name).is_file() for name in found["commands"])
    assert found["description"].strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    assert_all_in(found["files"], installed)


def test_a_plan_is_made_in_any_folder(installed: Path, tmp_path: Path) -> None:
    flags = ["--model", "meta-llama/Llama-3.1-8B", "--num_gpus", "8", "--gpu", "H100", "--seq_len", "1M"]
    command = [sys.executable, "-c", PLAN, str(installed / "bin" / "mst-plan"), *flags]
    done = run(command, tmp_path, PYTHONPATH=str(installed))
    assert "rank 0 of 8, dp 1: 131072 of 1048576 tokens, ZeRO-3" in done.stdout
    assert_all_in(done.stderr.splitlines(), installed)

"""The scripts of examples/ run as they are, and train."""

from __future__ import annotations

import re
import sys

import pytest
from processes import free_port, run

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", output)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer", "dpo"])
def test_on_one_process(name: str, tmp_path) -> None:
    done = run([sys.executable, f"examples/{name}.py", "--max_steps", "3", "--output_dir", str(tmp_path)], limit=200)
    assert done.returncode == 0, done.stdout
    assert len(losses(done.stdout)) == 3
    assert "sp_size 1, " in done.stdout


@pytest.mark.slow
def test_on_two_processes_that_share_a_sequence(tmp_path) -> None:
    flags = ["--sp_size", "2", "--max_steps", "3", "--output_dir", str(tmp_path)]
    done = run([*TORCHRUN, free_port(), "examples/sft.py", *flags], limit=200)
    assert done.returncode == 0, done.stdout
    assert len(losses(done.stdout)) == 3
    assert "sp_size 2, " in done.stdout

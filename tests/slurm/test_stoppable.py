"""slurm/stoppable.sh: what srun is told of how a rank ended."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from processes import ROOT

from mst_ds.command_line.exit_protocol import EXIT_STOPPED

# Says that it is ready, and ends with 75 when a signal comes, which it tells.
STOPS = f"""
trap 'echo USR1; exit {EXIT_STOPPED}' USR1
trap 'echo TERM; exit {EXIT_STOPPED}' TERM
echo ready
while :; do sleep 0.05; done
"""


def start(file: Path, script: str, *, rank: int = 0) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(ROOT / "slurm" / "stoppable.sh"), str(file), "bash", "-c", script],
        env={**os.environ, "SLURM_PROCID": str(rank)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_goes_on_to_the_rank_and_its_75_is_no_failure(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path / "stopped", STOPS)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, number.name.removeprefix("SIG") + "\n")
    assert (tmp_path / "stopped").exists()


def test_only_rank_0_leaves_the_file(tmp_path: Path) -> None:
    assert start(tmp_path / "stopped", f"exit {EXIT_STOPPED}", rank=1).wait(timeout=30) == 0
    assert not (tmp_path / "stopped").exists()


@pytest.mark.parametrize(("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 128 + signal.SIGKILL)])
def test_other_codes_stay(tmp_path: Path, script: str, code: int) -> None:
    assert start(tmp_path / "stopped", script).wait(timeout=30) == code
    assert not (tmp_path / "stopped").exists()


def test_a_rank_that_ends_otherwise_when_it_is_signalled(tmp_path: Path) -> None:
    process = start(tmp_path / "stopped", STOPS.replace(f"exit {EXIT_STOPPED}", "exit 4"))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert process.returncode == 4
    assert not (tmp_path / "stopped").exists()

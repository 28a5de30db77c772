"""How the ranks of a point are started, and how they are stopped: by DeepSpeed's launcher, or by SLURM's srun."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

from mst_ds.command_line.exit_protocol import EXIT_STOPPED
from mst_ds.files.shipped import shipped_folder
from mst_ds.scaling.guard import kill_tree
from mst_ds.scaling.sweep import Point, Sweep

_TRAIN = "mst_ds.commands.train"
_SECONDS_TO_STOP = 30.0
_LOOK_SECONDS = 0.5


class Interrupted(Exception):
    """The sweep is asked to stop: the point that runs has no result."""


class Launcher(Protocol):
    """Starts a point's ranks."""

    def check(self, points: Iterable[Point]) -> None:
        """Raises ValueError for a point that has no place here."""

    def command(self, point: Point, arguments: Sequence[str], stopped: Path) -> list[str]:
        """What trains with these arguments on each rank. Where ranks that were asked to stop do not end the command
        with `EXIT_STOPPED`, the file `stopped` is left."""

    def environment(self) -> dict[str, str]:
        """Variables of the command, where the user has not set them."""

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """Ends the ranks, and the launcher."""


@dataclass(frozen=True)
class DeepSpeedLauncher:
    """The ranks of this machine, with as many threads for each in every point, so that points compare."""

    threads: int

    def check(self, points: Iterable[Point]) -> None:
        for point in points:
            if point.num_nodes > 1:
                raise ValueError(
                    f"num_nodes is {point.num_nodes}, but outside of SLURM a point runs on this machine; allowed: 1, "
                    "or sbatch slurm/scaling.sbatch"
                )

    def command(self, point: Point, arguments: Sequence[str], stopped: Path) -> list[str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        # Without the folder of the guard among those that it imports from.
        guard = [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), str(os.getpid())]
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        ranks = ["--num_gpus", str(point.num_gpus), "--master_port", port]
        return [*guard, deepspeed, *ranks, "--module", _TRAIN, *arguments]

    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads)}

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        kill_tree(process)


@dataclass(frozen=True)
class SrunLauncher:
    """The first of this job's nodes, `hosts`, each with at most `tasks` ranks. slurm/setup.sh has set the rest.

    `minutes` are those that the job has left.
    """

    hosts: tuple[str, ...]
    tasks: int
    minutes: float = math.inf

    @classmethod
    def of_job(cls, environment: Mapping[str, str]) -> SrunLauncher:
        """The job that `environment` tells of.

        Raises:
            ValueError: slurm/setup.sh was not sourced, or SLURM does not answer.
        """
        if "MASTER_ADDR" not in environment:
            raise ValueError("MASTER_ADDR is not set in this job; allowed: sbatch slurm/scaling.sbatch")
        hosts = _said("scontrol", "show", "hostnames", environment["SLURM_JOB_NODELIST"]).split()
        job = environment["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in environment:
            # The last task's number is that of the whole array.
            job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
        left = _said("squeue", "--noheader", f"--jobs={job}", "--format=%L")
        return cls(tuple(hosts), _fewest(environment["SLURM_TASKS_PER_NODE"]), _minutes(left))

    def check(self, points: Iterable[Point]) -> None:
        for point in points:
            if point.num_nodes > len(self.hosts) or point.num_gpus > self.tasks:
                raise ValueError(
                    f"{point.name} needs {point.num_nodes} nodes with {point.num_gpus} ranks, but this job has "
                    f"{len(self.hosts)} with {self.tasks}; allowed: sbatch --nodes={point.num_nodes} "
                    f"--ntasks-per-node={point.num_gpus} or more"
                )

    def command(self, point: Point, arguments: Sequence[str], stopped: Path) -> list[str]:
        return [
            "srun",
            f"--nodes={point.num_nodes}",
            f"--ntasks={point.world_size}",
            f"--ntasks-per-node={point.num_gpus}",
            f"--nodelist={','.join(self.hosts[: point.num_nodes])}",
            "--export=ALL",
            "--kill-on-bad-exit=1",
            "--wait=0",
            "--quit-on-interrupt",
            str(shipped_folder("slurm") / "rank.sh"),
            str(shipped_folder("slurm") / "stoppable.sh"),
            str(stopped),
            sys.executable,
            "-m",
            _TRAIN,
            *arguments,
        ]

    def environment(self) -> dict[str, str]:
        return {}

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_SECONDS_TO_STOP)
        kill_tree(process)


def _said(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _fewest(tasks_per_node: str) -> int:
    """4 of "8(x3),4": eight tasks on each of three nodes, and four on the next."""
    return min(int(tasks.split("(")[0]) for tasks in tasks_per_node.split(","))


def _minutes(left: str) -> float:
    """Of "2-03:04:05", days first, or "4:05"; infinitely many where it is no time, as for a job without a limit."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left.strip())
    if found is None:
        return math.inf
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return days * 24 * 60 + hours * 60 + minutes + seconds / 60


def launcher_here(sweep: Sweep, environment: Mapping[str, str] = os.environ) -> Launcher:
    """srun inside a job of SLURM, else DeepSpeed's launcher.

    Raises:
        ValueError: a job without the environment that slurm/scaling.sbatch makes, or that ends before a point may.
    """
    if "SLURM_JOB_ID" in environment:
        launcher = SrunLauncher.of_job(environment)
        if launcher.minutes <= sweep.time_limit:
            raise ValueError(
                f"time_limit is {sweep.time_limit:g} minutes, but this job ends in {launcher.minutes:.2f}, and a point "
                f"that is cut off has no result; allowed: sbatch --time={math.ceil(sweep.time_limit) + 5}, or a "
                "smaller time_limit"
            )
        return launcher
    return DeepSpeedLauncher(threads=max(1, len(os.sched_getaffinity(0)) // max(sweep.num_gpus)))


def launch(launcher: Launcher, point: Point, arguments: Sequence[str], *, log: Path, limit: float) -> int | None:
    """Runs a point to its end.

    Args:
        arguments: of the training command.
        log: gets all that is written.
        limit: seconds after which the ranks are stopped.

    Returns:
        The launcher's exit code, None where the limit was reached.

    Raises:
        Interrupted: SIGTERM, SIGINT or SIGUSR1 arrived, here or at the ranks.
    """
    # The environment's own python and ninja come first.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    stopped = log.with_name("stopped")
    stopped.unlink(missing_ok=True)
    with log.open("wb") as file, _noted_signals() as signals:
        process = subprocess.Popen(
            launcher.command(point, arguments, stopped.absolute()),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**launcher.environment(), **os.environ, "PATH": path},
        )
        try:
            exit_code = _wait(process, signals, limit)
        finally:
            if process.poll() is None:
                launcher.stop(process)
    if signals:
        raise Interrupted(f"stopped by {signals[0].name}")
    if exit_code == EXIT_STOPPED or stopped.exists():
        raise Interrupted("its ranks were asked to stop")
    return exit_code


def _wait(process: subprocess.Popen[bytes], signals: Sequence[signal.Signals], limit: float) -> int | None:
    """The exit code; None when a signal has arrived or so many seconds are over."""
    deadline = time.monotonic() + limit
    while not signals and time.monotonic() < deadline:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=min(_LOOK_SECONDS, max(0.0, deadline - time.monotonic())))
    return None


@contextlib.contextmanager
def _noted_signals() -> Iterator[list[signal.Signals]]:
    """Signals that ask to stop, in a list: an exception could be raised before the process that it ends is known."""
    found: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        found.append(signal.Signals(number))

    before = {each: signal.signal(each, note) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        yield found
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)

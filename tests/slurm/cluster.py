"""What the tests do with a cluster of slurm/local: submit a job, look at it, wait for it."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from processes import ROOT

START, STOP = (str(ROOT / "slurm" / "local" / name) for name in ("start.sh", "stop.sh"))
WAIT = 240.0


def wait_until(is_so: Callable[[], bool], what: str, *, limit: float = WAIT) -> None:
    deadline = time.monotonic() + limit
    while not is_so():
        assert time.monotonic() < deadline, f"not within {limit} s: {what}"
        time.sleep(0.05)  # looks, not waits: it ends when it is so


@dataclass(frozen=True)
class Job:
    """One job of `cluster`, whose batch script writes to `log`."""

    cluster: Cluster
    number: str
    log: Path

    def field(self, name: str) -> str:
        """One of those that scontrol shows: JobState, Restarts, ExitCode ..."""
        shown = self.cluster.run("scontrol", "--oneliner", "show", "job", self.number)
        found = re.search(rf"\b{name}=(\S+)", shown)
        assert found is not None, shown
        return found[1]

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def has_ended(self) -> bool:
        """Whether it has left the queue. Its state does not tell: one that is being requeued may look cancelled."""
        return self.number not in self.cluster.run("squeue", "--noheader", "--format=%A").split()

    def wait_for(self, is_so: Callable[[], bool], what: str) -> None:
        """Waits for something that must happen while the job is there."""
        wait_until(lambda: is_so() or self.has_ended(), what)
        assert is_so(), f"the job ended without: {what}\n{self.output()}"

    def end(self, *, limit: float = WAIT) -> str:
        """Waits until the job has left the queue, and returns its last state."""
        wait_until(self.has_ended, f"job {self.number} ended", limit=limit)
        return self.field("JobState")


@dataclass(frozen=True)
class Cluster:
    """A running one, whose files lie in `folder`."""

    folder: Path

    @classmethod
    def start(cls, folder: Path) -> Cluster:
        done = subprocess.run([START, str(folder)], check=False, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"export SLURM_CONF={folder}/slurm.conf" in done.stdout
        return cls(folder)

    def stop(self) -> None:
        subprocess.run([STOP, str(self.folder)], check=True, timeout=120)

    def run(self, *command: str, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
        """Runs one of SLURM's commands against this cluster, and returns what it prints."""
        variables = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"), **(environment or {})}
        done = subprocess.run(command, cwd=cwd, env=variables, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str, log: Path, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> Job:
        """sbatch with these options, the script and its arguments."""
        number = self.run("sbatch", "--parsable", f"--output={log}", *words, environment=environment, cwd=cwd).strip()
        return Job(self, number, log)


def processes_of(path: Path) -> list[psutil.Process]:
    """Those that are alive and have to do with a file or folder: by an argument, or as the cluster they belong to."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("SLURM_CONF", "")]
            if any(str(path) in word for word in words) and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found

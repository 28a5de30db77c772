"""slurm/local: a cluster is there when start.sh returns, beside others, and gone when stop.sh does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
from cluster import START, STOP, Cluster, processes_of, wait_until
from processes import has_ended

ESCAPES = "setsid sleep 12345 & echo $! > {file}; sleep 12345"


def test_both_nodes_run_tasks(cluster: Cluster) -> None:
    output = cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME $SLURM_PROCID")
    assert sorted(output.splitlines()) == ["n1 0", "n2 1"]


def test_a_second_cluster_runs_beside_and_leaves_nothing(
    cluster: Cluster, cluster_folder: Path, tmp_path: Path
) -> None:
    other = Cluster.start(cluster_folder)
    try:
        file = tmp_path / "pid"
        job = other.submit("--wrap", ESCAPES.format(file=file), log=tmp_path / "log")
        job.wait_for(lambda: file.exists() and bool(file.read_text()), "the job started")
        sleeper = psutil.Process(int(file.read_text()))
        assert not cluster.run("squeue", "--noheader")
    finally:
        other.stop()
    assert has_ended(sleeper)
    assert processes_of(cluster_folder) == []
    assert not cluster_folder.exists()
    assert len(cluster.run("sinfo", "--noheader", "--Node").splitlines()) == 2


def test_a_folder_holds_one_cluster(cluster: Cluster) -> None:
    done = subprocess.run([START, str(cluster.folder)], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == (
        f"start.sh: error: {cluster.folder} holds a cluster already; stop it first: slurm/local/stop.sh "
        f"{cluster.folder}\n"
    )


def test_stopping_what_is_not_there(tmp_path: Path) -> None:
    done = subprocess.run([STOP, str(tmp_path)], check=False, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"stop.sh: no cluster in {tmp_path}\n")
    assert tmp_path.exists()


def test_a_node_that_does_not_come_up_ends_the_start(cluster_folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "slurmd"
    broken.write_text('#!/bin/sh\n[ "$2" = n1 ] || exec /usr/sbin/slurmd "$@"\nexit 1\n', encoding="utf-8")
    broken.chmod(0o755)
    done = subprocess.run(
        ["env", f"PATH={tmp_path}:/usr/sbin:/usr/bin:/bin", START, str(cluster_folder)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "start.sh: error: a daemon did not start" in done.stderr
    assert not cluster_folder.exists()
    wait_until(lambda: processes_of(cluster_folder) == [], "all daemons ended", limit=10)

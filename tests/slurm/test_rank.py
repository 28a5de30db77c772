"""slurm/rank.sh: what a task of srun finds in its environment as a rank, and what it refuses."""

from __future__ import annotations

import os
import subprocess

import pytest
from cluster import Cluster
from processes import ROOT

# Of task 5, as srun sets them for four nodes with two tasks each.
TASK = {
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_NODEID": "2",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "n3",
}
SHOW = 'echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $LOCAL_SIZE"'


def start(script: str = SHOW, **variables: str) -> subprocess.CompletedProcess[str]:
    others = {name: value for name, value in os.environ.items() if not name.endswith("_VISIBLE_DEVICES")}
    return subprocess.run(
        [str(ROOT / "slurm" / "rank.sh"), "bash", "-c", script],
        env={**others, **TASK, **variables},
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"CUDA_VISIBLE_DEVICES": "0,1"},
        {"ROCR_VISIBLE_DEVICES": "0,1,2"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},  # what SLURM says where a job has no GPUs
    ],
)
def test_a_task_becomes_a_rank(variables: dict[str, str]) -> None:
    done = start(**variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "5 8 1 2 2\n", "rank 5 of 8 on n3\n")


@pytest.mark.parametrize(
    ("variables", "threads"),
    [({"SLURM_CPUS_ON_NODE": "13"}, "6"), ({"SLURM_CPUS_ON_NODE": "1"}, "1"), ({"OMP_NUM_THREADS": "3"}, "3")],
)
def test_a_rank_has_its_part_of_the_cores(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], threads: str
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert start('echo "$OMP_NUM_THREADS"', **{"SLURM_CPUS_ON_NODE": "64", **variables}).stdout.split() == [threads]


def test_tasks_of_two_nodes(cluster: Cluster) -> None:
    output = cluster.run("srun", "--nodes=2", "--ntasks-per-node=2", "slurm/rank.sh", "bash", "-c", SHOW)
    assert sorted(output.splitlines()) == ["0 4 0 2 2", "1 4 1 2 2", "2 4 0 2 2", "3 4 1 2 2"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1"},
            "tasks per node are 2(x3),1; allowed: as many on each (--ntasks-per-node)",
        ),
        (
            # Dealt out in turns: tasks 1 and 5 are those of the second node.
            {"SLURM_NODEID": "1"},
            "task 5 is number 1 on node number 1; allowed: tasks that fill one node after another "
            "(--distribution=block)",
        ),
        # As --gpus-per-task=1 makes it.
        *(
            (
                {name: "0"},
                "task 5 sees the GPUs '0', and its node has 2 ranks; allowed: all of the node's GPUs for each "
                "(--gpus-per-node=2, without --gpus-per-task and --gpu-bind)",
            )
            for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
        ),
    ],
)
def test_tasks_that_make_no_mesh_are_refused(variables: dict[str, str], message: str) -> None:
    done = start(**variables)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"rank.sh: error: {message}\n")

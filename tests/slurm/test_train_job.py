"""slurm/train.sbatch on two nodes: it trains, comes back when it was stopped, and fails when a rank does."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from cluster import Cluster, Job, processes_of, wait_until
from processes import ROOT, run
from trainings import FLAGS, LIMIT, assert_same_run, command, losses, with_mesh

pytestmark = pytest.mark.timeout(900)

SCRIPT = "slurm/train.sbatch"


@pytest.fixture(scope="module")
def ds_config(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two ranks share a sequence, on one node or on two, each layer in chunks."""
    return with_mesh(tmp_path_factory.mktemp("mesh"), sp_size=2, accumulation=1, layer_chunks=4)


@pytest.fixture(scope="module")
def local(ds_config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted run with two ranks, without SLURM."""
    folder = tmp_path_factory.mktemp("runs") / "local"
    done = run(command(folder, ds_config=ds_config), limit=LIMIT)
    assert done.returncode == 0, done.stdout
    return folder


class Runs:
    """Submits runs on two nodes into folders of their own, and leaves none behind."""

    def __init__(self, cluster: Cluster, ds_config: str, folder: Path) -> None:
        self._cluster, self._ds_config, self._folder = cluster, ds_config, folder
        self._jobs: list[Job] = []
        self.output_dir = folder / "a run of 50%t"  # what srun would fill in

    def submit(self, *flags: str, options: tuple[str, ...] = ("--nodes=2",)) -> Job:
        words = [*options, SCRIPT, "--ds_config", self._ds_config, "--output_dir", str(self.output_dir)]
        self._jobs.append(self._cluster.submit(*words, *FLAGS, *flags, log=self._folder / "job.log"))
        return self._jobs[-1]

    def rank_log(self, rank: int) -> str:
        file = self.output_dir / "logs" / self._jobs[-1].number / f"rank-{rank}.log"
        return file.read_text(encoding="utf-8")

    def has_saved(self, step: int) -> bool:
        return (self.output_dir / "checkpoints" / f"step-{step:08d}").exists()

    def has_trained(self) -> bool:
        return (self.output_dir / "metrics.jsonl").exists() and bool(losses(self.output_dir))

    def ranks(self) -> dict[int, psutil.Process]:
        """The training processes themselves, without what started them."""
        found: dict[int, psutil.Process] = {}
        for each in processes_of(self.output_dir):
            with contextlib.suppress(psutil.NoSuchProcess):  # one that was started for a moment
                if each.cmdline()[2:3] == ["launch/train.py"]:
                    found.setdefault(int(each.environ()["RANK"]), each)
        return found

    def cancel(self) -> None:
        for job in self._jobs:
            if not job.has_ended():
                self._cluster.run("scancel", job.number)
                job.end()


@pytest.fixture
def runs(cluster: Cluster, ds_config: str, tmp_path: Path) -> Iterator[Runs]:
    made = Runs(cluster, ds_config, tmp_path)
    yield made
    made.cancel()


def test_two_nodes_train_one_model(runs: Runs, local: Path) -> None:
    job = runs.submit()
    assert job.end() == "COMPLETED", job.output()
    for rank in range(2):
        assert f"rank {rank} of 2 on n{rank + 1}\n" in runs.rank_log(rank)
    assert "rank 0 of 2, dp 1: " in runs.rank_log(0)
    assert "sp_size 2" in runs.rank_log(0)
    assert_same_run(runs.output_dir, local)


def test_ranks_of_one_node_train_one_model(runs: Runs, local: Path) -> None:
    job = runs.submit(options=("--nodes=1", "--ntasks-per-node=2"))
    assert job.end() == "COMPLETED", job.output()
    for rank in range(2):
        assert f"rank {rank} of 2 on n1\n" in runs.rank_log(rank)
    assert_same_run(runs.output_dir, local)


def test_a_requeued_job_goes_on_by_itself(cluster: Cluster, runs: Runs, local: Path) -> None:
    job = runs.submit()
    job.wait_for(lambda: runs.has_saved(6), "step 6 saved")
    cluster.run("scontrol", "requeue", job.number)
    assert job.end() == "COMPLETED", job.output()
    assert job.field("Restarts") == "1"
    assert "goes on after step" in runs.rank_log(0)
    assert runs.rank_log(1).count("rank 1 of 2 on n") == 2
    assert_same_run(runs.output_dir, local)


def test_a_job_that_is_signalled_saves_and_comes_back(cluster: Cluster, runs: Runs, local: Path) -> None:
    job = runs.submit("--save_steps", "0")
    job.wait_for(runs.has_trained, "a step")
    cluster.run("scancel", "--signal=USR1", job.number)
    assert job.end() == "COMPLETED", job.output()
    assert job.field("Restarts") == "1"
    assert re.search(r"stopped after step \d+ by SIGUSR1", runs.rank_log(0))
    assert f"Back to the queue: scontrol requeue {job.number}" in job.output()
    assert_same_run(runs.output_dir, local)


def test_the_time_limit_brings_a_job_back_and_cancelling_does_not(cluster: Cluster, runs: Runs) -> None:
    # The script asks for the signal 300 s before the limit; SLURM sends it up to a minute earlier.
    job = runs.submit("--max_steps", "100000", "--save_steps", "0", options=("--nodes=2", "--time=7"))
    job.wait_for(runs.has_trained, "a step")
    wait_until(lambda: job.field("Restarts") == "1", "the signal before the time limit")
    assert re.search(r"stopped after step \d+ by SIGUSR1", runs.rank_log(0))
    job.wait_for(lambda: "goes on after step" in runs.rank_log(0), "the second start")
    steps = len(losses(runs.output_dir))
    job.wait_for(lambda: len(losses(runs.output_dir)) > steps, "a step more")
    cluster.run("scancel", job.number)
    assert job.end() == "CANCELLED"
    assert job.field("Restarts") == "1"
    assert processes_of(runs.output_dir) == []


def test_a_task_of_an_array_comes_back_alone(cluster: Cluster, tmp_path: Path) -> None:
    script = tmp_path / "task.sh"
    script.write_text(
        f'#!/bin/bash\nexec bash {SCRIPT} "$@" --output_dir {tmp_path}/$SLURM_ARRAY_TASK_ID\n', encoding="utf-8"
    )
    flags = [*FLAGS, "--max_steps", "100000", "--save_steps", "0"]
    words = ["--nodes=1", "--exclusive", "--array=0-1", "--requeue", str(script), *flags]
    job = cluster.submit(*words, log=tmp_path / "task-%a.log")
    tasks = [Job(cluster, f"{job.number}_{index}", tmp_path / f"task-{index}.log") for index in range(2)]
    try:
        for index in range(2):
            metrics = tmp_path / str(index) / "metrics.jsonl"
            wait_until(lambda file=metrics: file.exists() and losses(file.parent) != [], "a step of each task")
        # The last one, whose own number is the array's.
        assert tasks[1].field("JobId") == job.number
        cluster.run("scancel", "--signal=USR1", tasks[1].number)
        wait_until(lambda: tasks[1].field("Restarts") == "1", "the task went back to the queue")
        assert (tasks[0].field("Restarts"), tasks[0].field("JobState")) == ("0", "RUNNING")
    finally:
        cluster.run("scancel", job.number)
        wait_until(lambda: job.number not in cluster.run("squeue", "--noheader", "--format=%F").split(), "the end")


def test_a_rank_that_dies_fails_the_job(cluster: Cluster, runs: Runs) -> None:
    job = runs.submit("--max_steps", "100000")
    job.wait_for(lambda: runs.has_saved(3), "step 3 saved")
    runs.ranks()[1].kill()
    assert job.end(limit=60) == "FAILED"
    assert cluster.run("squeue", "--noheader") == ""
    assert processes_of(runs.output_dir) == []
    assert "n2: task 1: Exited with exit code 137" in job.output()
    assert "train.sbatch: error: the run ended with code 1" in job.output()
    assert job.field("Restarts") == "0"


def test_a_rank_that_raises_fails_the_job_with_its_error(cluster: Cluster, runs: Runs) -> None:
    (runs.output_dir / "metrics.jsonl").mkdir(parents=True)  # where rank 0 would write
    job = runs.submit(options=("--nodes=2", "--hold"))
    log = runs.output_dir / "logs" / job.number / "rank-0.log"
    log.parent.mkdir(parents=True)
    log.write_text("rank 0 of 2 on n1\nmst-train: error: rank 0: of an earlier start\n", encoding="utf-8")
    cluster.run("scontrol", "release", job.number)
    assert job.end() == "FAILED"
    assert "mst-train: error: rank 0: [Errno 21] Is a directory:" in job.output()
    assert "another rank has ended" not in job.output()
    assert "of an earlier start" not in job.output()


def test_flags_are_refused_before_the_ranks_start(runs: Runs) -> None:
    job = runs.submit("--max_stepz", "3")
    assert job.end() == "FAILED"
    assert job.field("ExitCode") == "2:0"
    (line,) = job.output().splitlines()
    assert line.startswith("train.sbatch: error: unknown flag '--max_stepz'")


def test_nodes_of_unlike_size_are_refused(runs: Runs) -> None:
    job = runs.submit(options=("--nodes=2", "--ntasks=3"))
    assert job.end() == "FAILED"
    assert job.output().count("rank.sh: error: tasks per node are 2,1; allowed: as many on each") == 1


def test_one_task_for_a_node_with_many_gpus_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    """This cluster has no GPUs, so that what SLURM says of them is handed through from here."""
    environment = {"SLURM_GPUS_ON_NODE": "8"}
    job = cluster.submit("--nodes=2", SCRIPT, log=tmp_path / "log", environment=environment)
    assert job.end() == "FAILED"
    assert job.output() == (
        "train.sbatch: error: one task on each node with 8 GPUs would use one GPU of them; allowed: a task for each "
        "(--ntasks-per-node=8)\n"
    )


def test_another_folder_and_another_environment_are_refused(cluster: Cluster, tmp_path: Path) -> None:
    elsewhere = cluster.submit(str(ROOT / SCRIPT), log=tmp_path / "elsewhere.log", cwd=tmp_path)
    # An environment with a python that has nothing installed.
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n', encoding="utf-8")
    (tmp_path / "python").chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    bare = cluster.submit(SCRIPT, log=tmp_path / "bare.log", environment=path)
    for job, expected in (
        (elsewhere, rf"train\.sbatch: error: sbatch was called in {tmp_path}; allowed: .*"),
        (bare, rf"train\.sbatch: error: 'python' \({tmp_path}/python\) cannot start .*No module named 'mst_ds'.*"),
    ):
        assert job.end() == "FAILED"
        assert re.fullmatch(expected, job.output().strip()), job.output()


def test_the_default_folder_is_the_jobs_and_its_own_checkpoints_come_first(tmp_path: Path) -> None:
    def settle(*flags: str) -> list[str]:
        done = run(["env", "SLURM_JOB_ID=17", sys.executable, "slurm/settle.py", *flags], limit=60)
        assert done.returncode == 0, done.stdout
        return done.stdout.splitlines()

    output_dir, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    assert settle() == ["runs/slurm-17", "auto"]
    assert settle("--resume", "auto") == ["runs/slurm-17", "auto"]
    flags = ["--output_dir", str(output_dir), "--resume", str(other)]
    assert settle(*flags) == [str(output_dir), str(other)]
    (output_dir / "checkpoints" / "step-00000003.partial").mkdir(parents=True)
    assert settle(*flags) == [str(output_dir), str(other)]
    (output_dir / "checkpoints" / "step-00000003").mkdir()
    assert settle(*flags) == [str(output_dir), "auto"]

"""launch/scale.py: sweeps that run, stop, go on, and share their points."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from processes import ROOT, assert_ended, run

from mst_ds.command_line.exit_protocol import EXIT_STOPPED
from mst_ds.commands import scale
from mst_ds.scaling import launcher_here, read_results, read_sweep, run_point
from mst_ds.scaling.launchers import DeepSpeedLauncher, Interrupted, SrunLauncher, launch
from mst_ds.scaling.result import DONE, FAILED, REFUSED, TIMED_OUT
from mst_ds.scaling.sweep import Point, Sweep

LIMIT = 500
COMMAND = [sys.executable, "launch/scale.py"]
SWEEP = """
num_gpus: 2
sp_size: 2
seq_len: 256
variants:
  planned: {}
  nowhere:
    train: {dataset: /nowhere.txt}
train: {max_steps: 3, preflight: false}
time_limit: 8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sweep.yaml"
    path.write_text(SWEEP, encoding="utf-8")
    return path


def children_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + LIMIT
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} was not made"
        time.sleep(0.01)  # looks, not waits: it ends when the file is there


@pytest.mark.slow
def test_a_sweep_is_killed_and_goes_on(file: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "sweep"
    flags = ["--sweep", str(file), "--output_dir", str(output_dir)]
    # Steps enough to be killed in the middle of them.
    first = subprocess.Popen([*COMMAND, *flags, "--max_steps", "100000"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    folder = output_dir / "points" / "nodes1-gpus2-sp2-256-planned"
    wait_for(folder / "run" / "metrics.jsonl", first)
    started = children_of(first)
    first.kill()
    first.communicate(timeout=60)
    assert len(started) >= 5  # guard, DeepSpeed's two, the ranks
    assert_ended(started)
    assert not (folder / "result.json").exists()
    done = run([*COMMAND, *flags, "--sp_size", "2", "3"], limit=LIMIT)
    assert done.returncode == 0, done.stdout
    by_name = {result.name: result for result in read_results(output_dir)}
    assert {name: result.status for name, result in by_name.items()} == {
        "nodes1-gpus2-sp2-256-planned": DONE,
        "nodes1-gpus2-sp3-256-planned": REFUSED,
        "nodes1-gpus2-sp2-256-nowhere": REFUSED,
        "nodes1-gpus2-sp3-256-nowhere": REFUSED,
    }
    trained, failed = by_name["nodes1-gpus2-sp2-256-planned"], by_name["nodes1-gpus2-sp2-256-nowhere"]
    assert (trained.steps, trained.tokens_per_step, trained.dp_size, trained.attempts) == (3, 256, 1, 1)
    assert trained.planned_bytes.keys() == trained.measured_bytes.keys() > {"forward", "backward"}
    assert trained.environment.keys() > {"device", "python", "torch", "deepspeed"}
    assert failed.device is None
    assert failed.error is not None
    assert failed.error.startswith("dataset is '/nowhere.txt', but no such file")
    assert (failed.steps, by_name["nodes1-gpus2-sp3-256-planned"].attempts) == (None, 0)
    block = json.loads((folder / "ds_config.json").read_text(encoding="utf-8"))["mst"]
    assert (block["sp_size"], block["mlp_chunks"]) == (2, "auto")
    assert "step 3/3" in (folder / "log.txt").read_text(encoding="utf-8")
    assert not (folder / "run" / "model").exists()
    for name in ("results.csv", "report.md", "plots/against_length.png"):
        assert (output_dir / name).is_file()
    assert_only_the_report_is_written_again(flags, output_dir)
    other = run([*COMMAND, *flags, "--max_steps", "4"], limit=LIMIT)
    assert other.returncode == 2
    assert "has the result of other flags or another DeepSpeed JSON; allowed: another output_dir" in other.stdout


def assert_only_the_report_is_written_again(flags: list[str], output_dir: Path) -> None:
    logs = {path: path.stat().st_mtime_ns for path in output_dir.rglob("log.txt")}
    assert len(logs) == 2
    (output_dir / "results.csv").unlink()
    again = run([*COMMAND, *flags], limit=LIMIT)
    assert again.returncode == 0, again.stdout
    assert {path: path.stat().st_mtime_ns for path in output_dir.rglob("log.txt")} == logs
    assert "[1/2] nodes1-gpus2-sp2-256-planned: done, " in again.stdout
    # Of all that have a result, not of those in this command.
    assert len((output_dir / "results.csv").read_text(encoding="utf-8").splitlines()) == 1 + 4


def assert_gone(pid: str) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        assert_ended([psutil.Process(int(pid))])


class Shell:
    """Stands in for a launcher: a shell command in place of the ranks."""

    def __init__(self, script: str) -> None:
        self._script = script

    def check(self, points: object) -> None:
        pass

    def command(self, point: Point, arguments: object, stopped: Path) -> list[str]:
        return ["bash", "-c", self._script, "bash", str(stopped)]

    def environment(self) -> dict[str, str]:
        return {"ANSWER": "42"}

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        DeepSpeedLauncher(1).stop(process)


@pytest.fixture
def sweep(file: Path) -> Sweep:
    return read_sweep(file)


def test_time_that_is_over_ends_all_that_was_started(file: Path, tmp_path: Path) -> None:
    sweep = read_sweep(file, {"time_limit": 0.05})
    result = run_point(sweep, sweep.points[0], tmp_path, Shell("sleep 12345 & echo $! $ANSWER; wait"))
    assert result is not None
    assert (result.status, result.error, result.attempts) == (TIMED_OUT, "not done after 0.05 minutes", 1)
    pid, answer = (tmp_path / "points" / sweep.points[0].name / "log.txt").read_text(encoding="utf-8").split()
    assert answer == "42"
    assert_gone(pid)


def test_a_rank_that_is_killed_is_started_once_more(sweep: Sweep, tmp_path: Path) -> None:
    count = tmp_path / "count"
    result = run_point(sweep, sweep.points[0], tmp_path, Shell(f"echo >> {count}; kill -KILL $$"))
    assert result is not None
    assert (result.status, result.attempts) == (FAILED, 2)
    assert result.error is not None
    assert "a rank ended without a word" in result.error
    assert count.read_text(encoding="utf-8") == "\n\n"


@pytest.mark.parametrize("script", [f"exit {EXIT_STOPPED}", 'touch "$1"'])
def test_ranks_that_are_asked_to_stop_are_no_result(sweep: Sweep, tmp_path: Path, script: str) -> None:
    with pytest.raises(Interrupted):
        run_point(sweep, sweep.points[0], tmp_path, Shell(script))
    assert read_results(tmp_path) == []
    result = run_point(sweep, sweep.points[0], tmp_path, Shell("true"))
    assert result is not None
    assert result.status == DONE


def test_results_of_other_flags_are_found_before_any_point_runs(
    file: Path, sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_point(sweep, sweep.points[-1], tmp_path, Shell("true"))
    monkeypatch.setattr(scale, "launcher_here", lambda _: Shell("true"))
    flags = ["--sweep", str(file), "--output_dir", str(tmp_path)]
    assert scale.main([*flags, "--max_steps", "4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"points/{sweep.points[-1].name} has the result of other flags" in line
    assert not (tmp_path / "points" / sweep.points[0].name).exists()
    assert scale.main(flags) == 0
    assert len(read_results(tmp_path)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_the_point(tmp_path: Path, sweep: Sweep, number: signal.Signals) -> None:
    log = tmp_path / "log.txt"
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name):
        launch(Shell(f"echo $$; kill -{number} $PPID; sleep 12345"), sweep.points[0], [], log=log, limit=60)
    assert_gone(log.read_text(encoding="utf-8"))
    assert signal.getsignal(number) is before


def test_a_point_that_another_process_runs_is_left_to_it(sweep: Sweep, tmp_path: Path) -> None:
    point = sweep.points[0]
    lock = tmp_path / "points" / point.name / "lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert run_point(sweep, point, tmp_path, Shell("true")) is None
    assert run_point(sweep, point, tmp_path, Shell("true")) is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no seq_len is given"),
        (["--seq_len", "1K"], "no output_dir is given"),
        (["--seq_len", "1K", "--max_stepz", "3"], "unknown flag '--max_stepz'; nearest: '--max_steps'"),
        (["--seq_len", "1K", "--sp_size", "x"], "argument --sp_size: invalid int value: 'x'"),
        (["--sweep", "nowhere.yaml"], "sweep is 'nowhere.yaml'; allowed: an existing YAML file"),
        (["--seq_len", "1K", "--output_dir", "OUT", "--num_nodes", "2"], "num_nodes is 2, but outside of SLURM"),
        (["--seq_len", "1K", "--output_dir", "OUT", "--point", "1"], "point is 1; allowed: 0 to 0"),
        (["--seq_len", "1K", "--output_dir", "OUT", "--predict"], "predict needs --gpu"),
        (["--seq_len", "1K", "--output_dir", "OUT", "--predict", "--gpu", "H10"], "gpu is 'H10'; nearest: 'H100'"),
        (["--seq_len", "1K", "--output_dir", "OUT", "--point", "0", "--count"], "not allowed with argument --point"),
        (["--seq_len", "1K", "--output_dir", "/proc/no"], "No such file or directory"),
        (["--seq_len", "1K", "--output_dir", "OUT", "--gpu", "H100"], "--gpu is what --predict is for"),
        (
            ["--seq_len", "1K", "--output_dir", "OUT", "--predict", "--gpu", "H100", "--host_memory_gib", "inf"],
            "host_memory_gib is inf; allowed: a number > 0",
        ),
        (["--report", "--output_dir", "/proc/no"], "output_dir is '/proc/no', but no such folder is here"),
        (["--report", "--output_dir", "OUT", "--point_", "1"], "unknown flag '--point_'"),
        # Before there is a job array of so many tasks.
        (["--seq_len", "1K", "--count", "--max_steps", "1"], "max_steps is 1"),
        (["--seq_len", "1K", "--count", "--ds_config", "no.json"], "ds_config is 'no.json'"),
    ],
)
def test_a_sweep_that_cannot_run_is_refused_in_one_line(tmp_path: Path, flags: list[str], message: str) -> None:
    output = [str(tmp_path) if flag == "OUT" else flag for flag in flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SLURM_JOB_ID", raising=False)
        read, write = os.pipe()
        with os.fdopen(write, "w") as stderr:
            patch.setattr(sys, "stderr", stderr)
            assert scale.main(output) == 2
    with os.fdopen(read) as said:
        (line,) = said.read().splitlines()
    assert line.startswith("mst-scale: error: ")
    assert message in line
    assert not (tmp_path / "points").exists()


def test_predictions_beside_what_ran(file: Path, tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--model", "meta-llama/Llama-3.1-8B", "--seq_len", "128K", "256K"]
    sizes = ["--num_nodes", "1", "4", "--num_gpus", "8", "--sp_size", "8"]
    done = run([*COMMAND, *flags, *sizes, "--predict", "--gpu", "H100", "--host_memory_gib", "1900"], limit=LIMIT)
    assert done.returncode == 0, done.stdout
    assert len(read_results(tmp_path)) == 4
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "Points that ran: none. Predicted: 4." in report
    assert "| default, predicted for H100 | more sequences of 128K, sp 8 |" in report
    assert (tmp_path / "plots" / "scaling.png").is_file()


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "4(x2)"}


def test_the_launcher_is_what_there_is(sweep: Sweep) -> None:
    assert isinstance(launcher_here(sweep, {}), DeepSpeedLauncher)
    with pytest.raises(ValueError, match=r"MASTER_ADDR is not set in this job; allowed: sbatch slurm/scaling\.sbatch"):
        launcher_here(sweep, JOB)


def with_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch, *, left: str) -> dict[str, str]:
    """The environment of a job, with commands of SLURM's that answer."""
    for name, answer in (("scontrol", "n1\nn2"), ("squeue", left)):
        (folder / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "{answer}"\n', encoding="utf-8")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return {**JOB, "MASTER_ADDR": "n1"}


@pytest.mark.parametrize(
    ("left", "minutes"),
    [("UNLIMITED", None), ("", None), ("4:30", 4.5), ("59:00", 59), ("1:00:30", 60.5), ("2-03:00:00", 51 * 60)],
)
def test_what_a_job_has_left(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str, minutes: float | None
) -> None:
    sweep = read_sweep(file, {"time_limit": 4})
    found = launcher_here(sweep, with_slurm(tmp_path, monkeypatch, left=left))
    assert found == SrunLauncher(("n1", "n2"), 4, math.inf if minutes is None else minutes)


def test_a_job_that_ends_before_its_point_may_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_slurm(tmp_path, monkeypatch, left="2:59")
    with pytest.raises(ValueError, match=r"time_limit is 3 minutes, but this job ends in 2\.98, .* sbatch --time=8"):
        launcher_here(read_sweep(file, {"time_limit": 3}), environment)


def test_a_task_of_an_array_asks_for_its_own_time(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = with_slurm(tmp_path, monkeypatch, left="9:00")
    (tmp_path / "squeue").write_text('#!/bin/sh\ncase "$*" in *jobs=7_3*) echo 9:00;; esac\n', encoding="utf-8")
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    assert launcher_here(sweep, environment) == SrunLauncher(("n1", "n2"), 4, 9)


def test_the_node_with_the_fewest_tasks_counts(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_slurm(tmp_path, monkeypatch, left="9:00") | {"SLURM_TASKS_PER_NODE": "4(x3),2"}
    assert launcher_here(sweep, environment) == SrunLauncher(("n1", "n2"), 2, 9)


def test_slurm_that_does_not_answer(sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = with_slurm(tmp_path, monkeypatch, left="9:00")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho 'scontrol: error: no' >&2; exit 1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^scontrol show hostnames n\[1-2\] failed: scontrol: error: no$"):
        launcher_here(sweep, environment)


def test_srun_takes_the_first_nodes_of_a_job(sweep: Sweep, tmp_path: Path) -> None:
    launcher, (point, _) = SrunLauncher(("n1", "n2", "n3"), tasks=2), sweep.points
    launcher.check([point])
    command = launcher.command(point, ["--seq_len=256"], tmp_path / "stopped")
    assert command[:5] == ["srun", "--nodes=1", "--ntasks=2", "--ntasks-per-node=2", "--nodelist=n1"]
    script = command.index(str(ROOT / "slurm" / "rank.sh"))
    assert command[script + 1 : script + 3] == [str(ROOT / "slurm" / "stoppable.sh"), str(tmp_path / "stopped")]
    assert command[-4:] == [sys.executable, "-m", "mst_ds.commands.train", "--seq_len=256"]
    for program in command[script : script + 2]:
        assert os.access(program, os.X_OK)
    for launcher in (SrunLauncher((), tasks=2), SrunLauncher(("n1",), tasks=1)):
        with pytest.raises(ValueError, match="needs 1 nodes with 2 ranks, but this job has"):
            launcher.check([point])

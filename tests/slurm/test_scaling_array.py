"""A sweep as a job array over two nodes: every point has a result, whatever happened to it."""

from __future__ import annotations

import csv
import json
import os
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import Cluster, processes_of, wait_until
from processes import ROOT, run

from mst_ds.data.tokenizer import byte_tokenizer

SWEEP = """
num_nodes: [1, 2]
seq_len: [256, 512, 1K, 16K]
variants:
  whole:
    mst: {mlp_chunks: 1, loss_chunks: 1, recompute: false}
train: {max_steps: 3, preflight: false, model: FOLDER/model, dataset: FOLDER/numbers.jsonl}
time_limit: 4
"""
POINTS = 8
# KiB: a rank takes some 3.2 GiB of addresses before it has seen a token; 16K tokens take 4 more in a wide model.
LIMITED = """#!/usr/bin/env bash
if [[ $SLURM_ARRAY_TASK_ID == [37] ]]; then ulimit -v 4000000; fi
exec bash slurm/scaling.sbatch "$@"
"""
LIMIT = 500.0


# Eight jobs, each with imports of its own, on however few cores.
@pytest.mark.timeout(900)
def test_a_sweep_through_the_array(cluster: Cluster, tmp_path: Path) -> None:
    sweep, script, output_dir = tmp_path / "sweep.yaml", tmp_path / "limited.sh", tmp_path / "sweep"
    write_model_and_data(tmp_path)
    sweep.write_text(SWEEP.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    script.write_text(LIMITED, encoding="utf-8")
    flags = ["--sweep", str(sweep), "--output_dir", str(output_dir)]
    counted = run([sys.executable, "launch/scale.py", *flags, "--count"], limit=60)
    assert counted.stdout == f"{POINTS}\n"
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    job = cluster.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--array=0-{POINTS - 1}",
        str(script),
        *flags,
        log=tmp_path / "task-%a.log",
        environment={"PATH": path},
    )
    killed = output_dir / "points" / "nodes1-gpus1-sp1-512-whole" / "run"
    wait_until(lambda: any(map(is_rank, processes_of(killed))), "a rank of the point to be killed")
    for process in processes_of(killed):
        if is_rank(process):
            process.kill()

    def is_over() -> bool:
        return job.number not in cluster.run("squeue", "--noheader", "--format=%F").split()

    wait_until(is_over, "the array ended", limit=LIMIT)
    logs = "".join(path.read_text(encoding="utf-8") for path in sorted(tmp_path.glob("task-*.log")))
    with (output_dir / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = {(int(row["num_nodes"]), int(row["seq_len"])): row for row in csv.DictReader(file)}
    assert len(rows) == POINTS, logs
    for (num_nodes, seq_len), row in rows.items():
        assert row["attempts"] == ("2" if (num_nodes, seq_len) == (1, 512) else "1"), logs
        if seq_len == 16 * 1024:
            assert row["status"] == "out of memory", logs
            assert "ran out of memory in the " in row["error"]
        else:
            assert (row["status"], row["steps"], row["error"]) == ("done", "3", ""), logs
            assert float(row["tokens_per_second"]) > 0
            assert float(row["measured_peak_bytes"]) > 0
    report = (output_dir / "report.md").read_text(encoding="utf-8")
    assert "Points that ran: 6 done, 2 out of memory." in report
    assert "| whole | more sequences of 512, sp 1 |" in report
    for name in ("against_length", "scaling", "planned_against_measured"):
        assert f"plots/{name}.png" in report
        assert (output_dir / "plots" / f"{name}.png").stat().st_size > 0
    wait_until(lambda: processes_of(output_dir) == [], "no process is left", limit=30)


def write_model_and_data(folder: Path) -> None:
    """A layer whose MLP is wide, so that few tokens take much memory and little time."""
    config = json.loads((ROOT / "mst_ds" / "model_configs" / "small_llama" / "config.json").read_text(encoding="utf-8"))
    config |= {"intermediate_size": 16384, "num_hidden_layers": 1}
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    documents = [json.dumps({"text": f"{number} is a number. " * 60}) for number in range(100)]
    (folder / "numbers.jsonl").write_text("\n".join(documents), encoding="utf-8")


def is_rank(process: Any) -> bool:
    """Not what is started before it, whose arguments are the same and more."""
    try:
        return process.cmdline()[1:3] == ["-m", "mst_ds.commands.train"]
    except psutil.NoSuchProcess:  # it has ended since it was found
        return False


def test_a_job_that_is_no_array_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("slurm/scaling.sbatch", log=tmp_path / "log")
    assert job.end() == "FAILED"
    assert job.output() == "scaling.sbatch: error: this job is no array; allowed: sbatch --array=0-<points - 1>\n"

"""mst-plan --calibrate: the times, the reserve and the host of a run that has ended, in what is answered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT

from mst_ds.answers import Run, answer_request
from mst_ds.commands import plan as plan_command
from mst_ds.config import GIB, TrainConfig
from mst_ds.gpus import Gpu, gpu_by_name
from mst_ds.planner import plan_of_request, read_request
from mst_ds.planner.calibration import calibration_record, read_calibration

MODEL, DS_CONFIG, SEQ_LEN = "meta-llama/Llama-3.1-8B", "zero3_mst.json", 4096
SECONDS = 2.5
# Of a step that takes so long, attention most.
PROFILED = {"matrices": 0.4, "attention": 1.6, "passes": 0.2, "micro-batch": 2.4, "optimizer": 0.1}


def calibrated_by(folder: Path, gpu: Gpu | None, profile: Mapping[str, float] | None = None) -> tuple[str, ...]:
    """The flags that plan for the machine of a run, which this writes."""
    request = read_request(MODEL, DS_CONFIG, world_size=8, seq_len=SEQ_LEN, device_memory=79 * GIB, sp_size=8, gpu=gpu)
    record = calibration_record(
        request,
        plan_of_request(request),
        steps_done=0,
        profiled_step=None if profile is None else 3,
        profile=profile,
        reserve=None if gpu is None else 5 * GIB,
        process_bytes=3 * GIB,
    )
    (folder / "summary.json").write_text(json.dumps({"calibration": record}), encoding="utf-8")
    lines = [json.dumps({"step": step, "loss": 1.0, "seconds": SECONDS}) for step in range(1, 6)]
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return ("--model", MODEL, "--num_gpus", "8", "--sp_size", "8", "--calibrate", str(folder))


def planned(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert plan_command.main([*flags, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("profile", [None, PROFILED])
def test_the_runs_own_length_takes_what_it_took(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    profile: Mapping[str, float] | None,
) -> None:
    monkeypatch.chdir(ROOT)
    flags = calibrated_by(tmp_path, gpu_by_name("H100"), profile)
    found = planned(capsys, *flags, "--seq_len", str(SEQ_LEN), "--host_memory_gib", "1900", "--tokens", "1e8")
    assert found["predicted_step_seconds"] == pytest.approx(SECONDS, rel=1e-9)
    assert found["cost"]["gpu_hours"] == pytest.approx(8 * 1e8 / SEQ_LEN * SECONDS / 3600, rel=1e-9)
    assert found["trust"].startswith("times are by a run, which attained ")
    assert found["trust"].endswith(" of what is predicted for its H100")
    (reserve,) = (term["bytes"] for term in found["phases"][0]["terms"] if term["name"] == "reserve")
    assert reserve == 5 * GIB
    assert found["host_memory"] == 1900 * GIB // 8 - 3 * GIB


def test_a_calibrated_reference_has_its_part_of_a_step_by_the_runs_rates(tmp_path: Path) -> None:
    """Where attention is slow and products are as predicted, what a forward has of both is not what it was."""
    calibrated_by(tmp_path, gpu_by_name("H100"), PROFILED)
    gpu = read_calibration(tmp_path).gpu
    train = TrainConfig(objective="dpo")
    request = read_request(
        MODEL,
        DS_CONFIG,
        world_size=8,
        seq_len=2 * SEQ_LEN,
        device_memory=79 * GIB,
        sp_size=8,
        gpu=gpu,
        train=train,
    )
    answer = answer_request(request, Run(has_reference=True), has_changes=False)
    assert (answer.plan.settings.recompute, answer.plan.settings.keep_mlp) == (False, True)
    assert answer.cost is not None
    assert answer.reference is not None
    products = 2 * (32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336) + 4096 * 128256) / gpu.attained.matrices
    attention = 4 * 32 * SEQ_LEN // 2 * 32 * 128 / gpu.attained.attention
    once = products / 0.62 + attention / 0.38
    all_of_it = 3 * products / 0.62 + attention / 0.38 + 2.5 * attention / 0.31
    assert answer.reference.hours == pytest.approx(answer.cost.hours * once / all_of_it, rel=1e-9)


def test_a_run_on_a_cpu_does_not_say_its_memory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    flags = (*calibrated_by(tmp_path, None), "--seq_len", str(SEQ_LEN))
    assert plan_command.main(flags) == 2
    error = capsys.readouterr().err
    assert "device_memory is not known, as a run on a CPU does not say it; allowed: --device_memory_gib, or" in error
    found = planned(capsys, *flags, "--device_memory_gib", "100")
    assert (found["dtype"], found["host_memory"]) == ("fp32", None)

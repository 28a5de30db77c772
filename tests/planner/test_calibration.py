"""A run's own times calibrate plans: of another length on the same machine, and in no other way."""

import json
from dataclasses import asdict, replace

import pytest
from planned import MODEL

from mst_ds.gpus import CPU, gpu_by_name
from mst_ds.planner import plan_of_request, read_request
from mst_ds.planner.calibration import calibration_record, read_calibration
from mst_ds.planner.cost import step_seconds

DS_CONFIG = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}


def request(gpu, seq_len=4096):
    return read_request(MODEL, DS_CONFIG, world_size=4, seq_len=seq_len, device_memory=2**34, sp_size=2, gpu=gpu)


def write_run(folder, record, seconds):
    lines = [{"step": step, "loss": 1.0, "seconds": each} for step, each in enumerate(seconds, 1)]
    lines.append({"step": len(seconds), "eval_loss": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"calibration": record}))


@pytest.mark.parametrize("name", ["H100", None])
def test_a_runs_time_is_predicted_from_it(tmp_path, name):
    gpu = None if name is None else gpu_by_name(name)
    asked = request(gpu)
    plan = plan_of_request(asked)
    record = calibration_record(asked, plan, reserve=3 * 2**30 if gpu else None, process_bytes=2**32)
    write_run(tmp_path, record, [90.0, 7.0, 5.0, 5.5])
    found = read_calibration(tmp_path)
    assert found.measured_seconds == 5.5
    assert found.gpu.name == (name or "CPU")
    assert (found.reserve, found.process_bytes) == ((3 * 2**30, 2**32) if gpu else (None, None))
    # All of a step scales, the optimizer's on the host and the launches among it.
    work = asked.work.with_settings(**asdict(plan.settings))
    assert step_seconds(work, found.gpu) == pytest.approx(5.5, rel=1e-9)
    of_other = step_seconds(request(gpu, 8192).work, found.gpu)
    assert of_other == pytest.approx(
        5.5 / found.predicted_seconds * step_seconds(request(gpu, 8192).work, gpu or CPU), rel=1e-9
    )
    # What a CPU has calibrated is planned as a run there is: in fp32.
    asked_there = read_request(MODEL, "zero3_mst.json", world_size=1, seq_len=512, device_memory=2**34, gpu=found.gpu)
    assert asked_there.work.zero.dtype == ("fp32" if gpu is None else "bf16")
    # A run that was calibrated itself is no reason to count twice.
    again = calibration_record(replace(asked, rates=found.gpu), plan, reserve=None, process_bytes=0)
    assert again["predicted_step_seconds"] == pytest.approx(found.predicted_seconds, rel=1e-12)


def test_what_cannot_calibrate_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"summary\.json cannot be read .*; allowed: the output folder of a run that"):
        read_calibration(tmp_path)
    write_run(tmp_path, None, [1.0] * 9)
    with pytest.raises(ValueError, match="a run with no record for this; allowed: one of 3 steps or more"):
        read_calibration(tmp_path)
    asked = request(None)
    record = calibration_record(asked, plan_of_request(asked), reserve=None, process_bytes=0)
    write_run(tmp_path, record, [1.0, 1.0])
    with pytest.raises(ValueError, match="a run with 2 steps; allowed"):
        read_calibration(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"whose summary\.json or metrics\.jsonl is no JSON"):
        read_calibration(tmp_path)
    for summary, message in (("null", "no record for this"), ('{"calibration": {}}', "of another version")):
        write_run(tmp_path, record, [1.0] * 3)
        (tmp_path / "summary.json").write_text(summary)
        with pytest.raises(ValueError, match=message):
            read_calibration(tmp_path)


def test_a_gpu_without_a_name_is_no_cpu(tmp_path):
    asked = request(None)
    asked = replace(asked, work=replace(asked.work, capability=(8, 9)))
    write_run(tmp_path, calibration_record(asked, plan_of_request(asked), reserve=0, process_bytes=0), [1.0] * 3)
    found = read_calibration(tmp_path).gpu
    assert (found.capability, found.memory) == ((8, 9), 2**34)
    there = read_request(MODEL, "zero3_mst.json", world_size=1, seq_len=512, device_memory=2**34, gpu=found)
    assert there.work.zero.dtype == "bf16"

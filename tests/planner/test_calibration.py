"""A run's own times calibrate plans: of another length on the same machine, and in no other way."""

import json
from dataclasses import asdict, replace

import pytest
from planned import MODEL

from mst_ds.gpus import CPU, Attained, gpu_by_name
from mst_ds.planner import plan_of_request, read_request
from mst_ds.planner.calibration import attained_of, calibration_record, read_calibration
from mst_ds.planner.cost import StepTimes, step_seconds

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
    record = calibration_record(asked, plan, profile=None, reserve=3 * 2**30 if gpu else None, process_bytes=2**32)
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
    again = calibration_record(replace(asked, rates=found.gpu), plan, profile=None, reserve=None, process_bytes=0)
    assert StepTimes(**again["predicted_seconds"]).of_step == pytest.approx(found.predicted_seconds, rel=1e-12)


ON_A_GPU = StepTimes(2, 4.0, 3.0, 1.0, waits=1.0, collectives=2.0, host_copies=0.5, launches=0.3, optimizer=2.0)


def profile_of(truth, slowed=1.0):
    seconds = {name: getattr(truth, name) for name in ("matrices", "attention", "passes", "optimizer")}
    return {name: slowed * value for name, value in (seconds | {"micro-batch": truth.of_micro_batch}).items()}


@pytest.mark.parametrize("slower", [Attained(0.5, 0.8, 0.4, 0.5, 0.25), Attained(2.0, 1.6, 1.2, 1.5, 3.0)])
@pytest.mark.parametrize("waits", [1.0, 0.0])
def test_a_profiled_run_gives_a_rate_for_each_kind_of_work(slower, waits):
    predicted = replace(ON_A_GPU, waits=waits)
    truth = predicted.at(slower)
    # The profiled step was slower than others.
    found = attained_of(predicted, truth.of_step, profile_of(truth, slowed=1.1))
    # What no time was lost to cannot be seen.
    expected = slower if waits else replace(slower, others=1.0)
    assert asdict(found) == pytest.approx(asdict(expected), rel=1e-9)
    # Another length, with other shares of the kinds.
    other = StepTimes(1, 8.0, 12.0, 2.0, waits=2 * waits, collectives=2.0, host_copies=1.0, launches=0.6, optimizer=2.0)
    assert other.at(found).of_step == pytest.approx(other.at(slower).of_step, rel=1e-9)


def test_a_step_that_waits_for_what_runs_beside_it_is_predicted_from_it():
    predicted = replace(ON_A_GPU, waits=0.0)
    truth = predicted.at(Attained(others=0.1))
    assert truth.of_micro_batch == truth.collectives
    found = attained_of(predicted, truth.of_step, profile_of(truth))
    assert found.others == pytest.approx(0.1)
    assert predicted.at(found).of_step == pytest.approx(truth.of_step)


def test_what_cannot_calibrate_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"summary\.json cannot be read .*; allowed: the output folder of a run that"):
        read_calibration(tmp_path)
    write_run(tmp_path, None, [1.0] * 9)
    with pytest.raises(ValueError, match="a run with no record for this; allowed: one of 3 steps or more"):
        read_calibration(tmp_path)
    asked = request(None)
    record = calibration_record(asked, plan_of_request(asked), profile=None, reserve=None, process_bytes=0)
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
    write_run(
        tmp_path, calibration_record(asked, plan_of_request(asked), profile=None, reserve=0, process_bytes=0), [1.0] * 3
    )
    found = read_calibration(tmp_path).gpu
    assert (found.capability, found.memory) == ((8, 9), 2**34)
    there = read_request(MODEL, "zero3_mst.json", world_size=1, seq_len=512, device_memory=2**34, gpu=found)
    assert there.work.zero.dtype == "bf16"

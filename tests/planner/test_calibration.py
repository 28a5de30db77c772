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


def record_of(asked, plan, *, steps_done=0, profiled_step=None, profile=None, reserve=None, process_bytes=0):
    return calibration_record(
        asked,
        plan,
        steps_done=steps_done,
        profiled_step=profiled_step,
        profile=profile,
        reserve=reserve,
        process_bytes=process_bytes,
    )


def write_run(folder, record, seconds, skipped=()):
    lines = [
        {"step": step, "loss": 1.0, "seconds": each, "skipped_steps": sum(other <= step for other in skipped)}
        for step, each in enumerate(seconds, 1)
    ]
    lines.append({"step": len(seconds), "eval_loss": 2.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps({"calibration": record}))


@pytest.mark.parametrize("name", ["H100", None])
def test_a_runs_time_is_predicted_from_it(tmp_path, name):
    gpu = None if name is None else gpu_by_name(name)
    asked = request(gpu)
    plan = plan_of_request(asked)
    record = record_of(asked, plan, reserve=3 * 2**30 if gpu else None, process_bytes=2**32)
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
    again = record_of(replace(asked, rates=found.gpu), plan)
    assert StepTimes(**again["predicted_seconds"]).of_step == pytest.approx(found.predicted_seconds, rel=1e-12)


ON_A_GPU = StepTimes(
    2, 4.0, 3.0, 1.0, waits=1.0, collectives=2.0, host_copies=0.5, launches=0.3, optimizer=2.0, launches_wait=False
)
ON_A_CPU = replace(ON_A_GPU, waits=0.0, collectives=0.0, host_copies=0.0, launches_wait=True)


def profile_of(truth, slowed=1.0):
    seconds = {name: getattr(truth, name) for name in ("matrices", "attention", "passes", "optimizer")}
    return {name: slowed * value for name, value in (seconds | {"micro-batch": truth.of_micro_batch}).items()}


@pytest.mark.parametrize("slower", [Attained(0.5, 0.8, 0.4, 0.5, 0.5, 0.25), Attained(2.0, 1.6, 1.2, 1.5, 1.5, 3.0)])
@pytest.mark.parametrize("waits", [1.0, 0.0])
def test_a_profiled_run_gives_a_rate_for_each_kind_of_work(slower, waits):
    predicted = replace(ON_A_GPU, waits=waits)
    truth = predicted.at(slower)
    # The profiled step was slower than others.
    found = attained_of(predicted, truth.of_step, profile_of(truth, slowed=1.1))
    # What no time was lost to cannot be seen.
    expected = slower if waits else replace(slower, launches=1.0, links=1.0)
    assert asdict(found) == pytest.approx(asdict(expected), rel=1e-9)
    # Another length, with other shares of the kinds.
    other = replace(predicted, micro_batches=1, matrices=8.0, attention=12.0, passes=2.0, waits=2 * waits, launches=0.6)
    assert other.at(found).of_step == pytest.approx(other.at(slower).of_step, rel=1e-9)


def test_a_step_that_waits_for_what_runs_beside_it_is_predicted_from_it():
    predicted = replace(ON_A_GPU, waits=0.0)
    truth = predicted.at(Attained(launches=0.1, links=0.1))
    assert truth.of_micro_batch == truth.collectives
    found = attained_of(predicted, truth.of_step, profile_of(truth))
    assert found.launches == found.links == pytest.approx(0.1)
    assert predicted.at(found).of_step == pytest.approx(truth.of_step)


def test_links_that_a_run_did_not_use_stay_as_predicted():
    """One GPU waits for the CPU alone: that says nothing of the links that eight would have."""
    predicted = replace(ON_A_GPU, waits=0.0, collectives=0.0, host_copies=0.0)
    truth = predicted.at(Attained(launches=0.02))
    found = attained_of(predicted, truth.of_step, profile_of(truth))
    assert asdict(found) == pytest.approx(asdict(Attained(launches=0.02)))


def test_on_a_cpu_what_no_operator_takes_grows_with_passes():
    """It runs ahead of nothing: what is left is memory that tensors of their size take and give back."""
    assert ON_A_CPU.of_micro_batch == pytest.approx(8.3)
    truth = ON_A_CPU.at(Attained(passes=0.25))
    found = attained_of(ON_A_CPU, truth.of_step, profile_of(truth) | {"passes": truth.passes / 2})
    assert asdict(found) == pytest.approx(asdict(Attained(passes=0.25)))


def test_what_is_too_small_to_be_seen_stays_as_predicted():
    """Adapters have so few weights that their optimizer's step is its launches, and short sequences so few scores."""
    predicted = replace(ON_A_GPU, attention=0.01, optimizer=0.001)
    profiled = {"matrices": 8.0, "attention": 0.2, "passes": 2.0, "micro-batch": 11.2, "optimizer": 0.1}
    found = attained_of(predicted, 22.5, profiled)
    assert (found.matrices, found.attention, found.optimizer) == (pytest.approx(0.5), 1.0, 1.0)
    # What they take is not lost.
    assert predicted.at(found).of_step == pytest.approx(22.5)
    # What is predicted to be large, and takes no time, has been seen.
    fast = attained_of(ON_A_GPU, 22.5, profiled)
    assert (fast.attention, fast.optimizer) == (pytest.approx(15.0), pytest.approx(20.0))


@pytest.mark.parametrize(
    ("waits", "matrices", "attention", "passes", "micro_batch"),
    [
        pytest.param(1.0, 12.0, 0.0, 2.0, 16.0, id="attention that is products and a softmax"),
        pytest.param(1.0, 8.0, 6.0, 4.0, 14.0, id="streams that compute at the same time"),
        pytest.param(8.0, 8.0, 4.0, 2.0, 14.1, id="no wait where one is predicted"),
        pytest.param(1.0, 0.0, 0.0, 0.0, 14.0, id="a driver that shows no kernels"),
    ],
)
def test_kinds_that_do_not_add_up_predict_the_runs_own_step(waits, matrices, attention, passes, micro_batch):
    predicted = replace(ON_A_GPU, waits=waits)
    measured = 2 * micro_batch + 3.0
    profiled = {"matrices": matrices, "attention": attention, "passes": passes}
    found = attained_of(predicted, measured, profiled | {"micro-batch": micro_batch, "optimizer": 3.0})
    # 3% of a micro-batch is what no clock tells from nothing.
    assert predicted.at(found).of_step == pytest.approx(measured, rel=0.031)


def test_the_step_that_is_profiled_does_not_count(tmp_path):
    asked = request(None)
    plan = plan_of_request(asked)
    profile = profile_of(ON_A_CPU)
    write_run(tmp_path, record_of(asked, plan, profiled_step=3, profile=profile), [9.0, 1.0, 30.0])
    assert read_calibration(tmp_path).measured_seconds == 1.0


def test_of_a_resumed_run_the_steps_since_count(tmp_path):
    """Before it may have had other ranks and batches."""
    asked = request(None)
    plan = plan_of_request(asked)
    write_run(tmp_path, record_of(asked, plan, steps_done=5), [8.0] * 5 + [9.0, 1.0, 1.0])
    assert read_calibration(tmp_path).measured_seconds == 1.0
    write_run(tmp_path, record_of(asked, plan, steps_done=5), [8.0] * 5 + [9.0, 1.0])
    with pytest.raises(ValueError, match="a run with 2 steps after step 5, where it was resumed; allowed: one of 3"):
        read_calibration(tmp_path)


def test_steps_that_changed_no_weight_do_not_count(tmp_path):
    """A loss scale that is too large: the optimizer did nothing, and a profile of it says nothing."""
    asked = request(None)
    plan = plan_of_request(asked)
    record = record_of(asked, plan, profiled_step=3, profile=profile_of(ON_A_CPU))
    write_run(tmp_path, record, [9.0, 1.0, 1.0, 5.0, 5.0], skipped=(1, 2, 3))
    found = read_calibration(tmp_path)
    assert found.measured_seconds == 5.0
    assert len(set(asdict(found.gpu.attained).values())) == 1
    write_run(tmp_path, record, [9.0, 1.0, 1.0, 1.0], skipped=(1, 2, 3, 4))
    with pytest.raises(ValueError, match="a run with 4 steps, 4 of them skipped; allowed: one of 3 steps or more"):
        read_calibration(tmp_path)


def test_what_cannot_calibrate_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"summary\.json cannot be read .*; allowed: the output folder of a run that"):
        read_calibration(tmp_path)
    write_run(tmp_path, None, [1.0] * 9)
    with pytest.raises(ValueError, match="a run with no record for this; allowed: a run of this version"):
        read_calibration(tmp_path)
    asked = request(None)
    record = record_of(asked, plan_of_request(asked))
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
    write_run(tmp_path, record, [])
    (tmp_path / "metrics.jsonl").write_text('null\n3\n{"step": 1, "seconds": null}\n')
    with pytest.raises(ValueError, match="a run with 0 steps; allowed"):
        read_calibration(tmp_path)


def test_a_gpu_without_a_name_is_no_cpu(tmp_path):
    asked = request(None)
    asked = replace(asked, work=replace(asked.work, capability=(8, 9)))
    write_run(tmp_path, record_of(asked, plan_of_request(asked), reserve=0), [1.0] * 3)
    found = read_calibration(tmp_path).gpu
    assert (found.capability, found.memory) == ((8, 9), 2**34)
    there = read_request(MODEL, "zero3_mst.json", world_size=1, seq_len=512, device_memory=2**34, gpu=found)
    assert there.work.zero.dtype == "bf16"

"""Predictions: what the planner says, as results that are marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from mst_ds.config import GIB
from mst_ds.planner import DEFAULT_RESERVE, gpu_by_name, make_plan
from mst_ds.scaling.predict import predict_sweep
from mst_ds.scaling.result import DONE, OUT_OF_MEMORY, REFUSED, read_results
from mst_ds.scaling.sweep_file import read_sweep

MODEL = "meta-llama/Llama-3.1-8B"
H100 = gpu_by_name("H100")


def test_a_prediction_is_the_plan(tmp_path: Path) -> None:
    given = {"sp_size": [3, 8], "seq_len": ["1M", "64M"], "num_nodes": [2], "num_gpus": [8]}
    sweep = read_sweep(given=given, train={"model": MODEL})
    predicted = predict_sweep(sweep, tmp_path, H100, 200 * GIB)
    assert read_results(tmp_path) == predicted
    assert {result.source for result in predicted} == {"predicted for H100"}
    assert [result.status for result in predicted] == [REFUSED, REFUSED, DONE, OUT_OF_MEMORY]
    found = predicted[2]
    plan = make_plan(
        MODEL,
        sweep.ds_config(sweep.points[2]),
        world_size=16,
        seq_len=2**20,
        device_memory=H100.memory,
        reserve=DEFAULT_RESERVE,
        host_memory=25 * GIB,
        ranks_per_node=8,
        gpu=H100,
    )
    assert plan.predicted_step_seconds is not None
    assert found.step_seconds == plan.predicted_step_seconds
    # Two groups of ranks, a sequence each.
    assert found.tokens_per_second == pytest.approx(2 * 2**20 / plan.predicted_step_seconds)
    # The reserve is nothing that a run would measure.
    assert found.planned_peak_bytes == plan.peak_bytes - DEFAULT_RESERVE
    assert (found.steps, found.measured_peak_bytes, found.loss) == (None, None, None)
    assert predicted[3].tokens_per_second is None
    assert predicted[3].error is not None
    assert "GiB on the" in predicted[3].error


def test_adapters_are_predicted_as_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"]}', encoding="utf-8"
    )
    memory = []
    for train in ({}, {"peft_config": str(tmp_path)}, {"lora_r": 4, "lora_target_modules": "q_proj"}):
        sweep = read_sweep(given={"seq_len": ["1K"]}, train=train)
        (result,) = predict_sweep(sweep, tmp_path / "out", H100)
        memory.append(result.planned_bytes["initialisation"])
    assert memory[2] == memory[1] < memory[0] / 2

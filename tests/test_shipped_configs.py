"""Each shipped DeepSpeed JSON runs as it is, and its run leaves what the README says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ROOT, free_port, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from mst_ds.config import TrainConfig
from mst_ds.data import EvalLoader, load_tokenizer, load_training_data
from mst_ds.gpus import CPU
from mst_ds.model_shape import load_model_config
from mst_ds.planner.calibration import read_calibration
from mst_ds.topology import Topology
from mst_ds.training.step_profile import TRACE_FILE

STEPS, SEQ_LEN, EVAL_SAMPLES = 3, 256, 3
FLAGS = f"--max_steps {STEPS} --seq_len {SEQ_LEN} --eval_steps 2 --eval_samples {EVAL_SAMPLES} --profile true".split()


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    output: str

    def records(self, key: str) -> list[dict[str, Any]]:
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if key in record]


DS_CONFIGS = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name != "zero3_mst.json" else ()) for name in DS_CONFIGS],
)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """The command that `make train` ends up at, with each of the JSONs that "run as they are"."""
    folder = tmp_path_factory.mktemp("run") / "output"
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", free_port()]
    ds_config = f"ds_configs/{request.param}"
    # The first run on a machine compiles for a minute and tokenises for another.
    done = run([*launcher, "launch/train.py", "--ds_config", ds_config, *FLAGS, "--output_dir", str(folder)], limit=540)
    assert done.returncode == 0, done.stdout
    return FinishedRun(folder, done.stdout)


def test_a_run_writes_its_metrics(finished: FinishedRun) -> None:
    steps, evaluations = finished.records("loss"), finished.records("eval_loss")
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert [record["step"] for record in evaluations] == [2, 3]
    for record in steps:
        assert record.keys() >= {"step", "loss", "tokens_per_second", "grad_norm", "lr", "memory_bytes"}
        assert all(value > 0 for name, value in record.items() if name != "skipped_steps")
        assert record["skipped_steps"] == 0
    assert steps[-1]["loss"] < steps[0]["loss"]
    summary = json.loads((finished.folder / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["final_loss"]) == (STEPS, steps[-1]["loss"])
    assert summary["plan"]["topology"]["sp_size"] == 2
    events = EventAccumulator(str(finished.folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx([step["loss"] for step in steps])
    assert "evaluation loss" in finished.output


def test_a_profiled_run_calibrates_plans(finished: FinishedRun) -> None:
    found = read_calibration(finished.folder)
    # The first compiles, the third is profiled.
    assert found.measured_seconds == finished.records("loss")[1]["seconds"]
    assert found.gpu.name == CPU.name
    assert len(set(asdict(found.gpu.attained).values())) > 2
    assert (finished.folder / "profile" / TRACE_FILE).is_file()


def test_a_run_leaves_a_model_that_others_load(finished: FinishedRun) -> None:
    folder = finished.folder / "model"
    text = (folder / "config.json").read_text(encoding="utf-8")
    assert "attn_implementation" not in text
    assert "ulysses" not in text
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("def main(", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=-1).shape == (1, 9 + 4)
    # Loaded as any model is, it has the loss that the run's last evaluation measured: fp32, other sums.
    expected = finished.records("eval_loss")[-1]["eval_loss"]
    assert held_out_loss(model) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def held_out_loss(model: Any) -> float:
    """The plain model's mean loss over the tokens that the run held out of training."""
    config = TrainConfig(max_steps=STEPS, seq_len=SEQ_LEN, eval_steps=2, eval_samples=EVAL_SAMPLES)
    held_out = load_training_data(config, load_tokenizer(config, load_model_config(config.model))).held_out
    assert held_out is not None
    (batch,) = EvalLoader(held_out, Topology(0, 1, 1), micro_batch_size=EVAL_SAMPLES)
    logits = model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten()).item()

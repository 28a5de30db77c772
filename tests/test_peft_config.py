"""`--peft_config`: what is refused, and a run that trains adapters and leaves a folder that peft loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import tiny_llama
from trainings import Training
from transformers import AutoModelForCausalLM

from mst_ds.adapters import add_adapters, load_peft_config
from mst_ds.commands.export import main as export
from mst_ds.config import TrainConfig
from mst_ds.data import EvalLoader, load_tokenizer, load_training_data
from mst_ds.data.tokenizer import byte_tokenizer
from mst_ds.model_shape import load_model_config
from mst_ds.topology import Topology

LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "up_proj", "down_proj", "lm_head"]}


def write(folder: Path, content: str | dict[str, Any]) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ({"r": 4}, "is not a config of peft"),
        ({"peft_type": "LOTA", "r": 4}, "is not a config of peft"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "of_a_later_peft": 1}, "learns a prompt"),
    ],
)
def test_a_file_that_is_refused(
    tmp_path: Path, content: str | dict[str, Any], says: str, recwarn: pytest.WarningsRecorder
) -> None:
    with pytest.raises(ValueError, match=says) as error:
        load_peft_config(str(write(tmp_path, content)))
    assert "\n" not in str(error.value)
    assert not recwarn.list, "beside its one line"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"allowed: an existing adapter_config\.json, or a folder with one"):
        load_peft_config(str(tmp_path))


def test_targets_that_the_model_does_not_have(tmp_path: Path) -> None:
    config = load_peft_config(str(write(tmp_path, LORA | {"target_modules": ["query"]})))
    with pytest.raises(ValueError, match="query"):
        add_adapters(tiny_llama(), config)


def test_a_saved_adapter_is_trained_in_the_models_dtype(tmp_path: Path) -> None:
    config = load_peft_config(str(write(tmp_path, LORA | {"inference_mode": True})))
    model = add_adapters(tiny_llama().bfloat16(), config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name and parameter.dtype == torch.bfloat16 for name, parameter in trained.items())


def eval_loss(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found: float = next(record["eval_loss"] for record in records if "eval_loss" in record)
    return found


def test_a_run_trains_adapters_that_peft_loads_that_go_on_and_that_are_merged(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=320, max_position_embeddings=512)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    write(tmp_path, LORA)
    config = TrainConfig(model=str(tmp_path / "base"), seq_len=256, max_steps=3, eval_steps=3, eval_samples=3)
    flags = f"--model {config.model} --seq_len 256 --max_steps 3 --eval_steps 3 --eval_samples 3 --learning_rate 0.05"
    training = Training(tmp_path / "run", *flags.split(), "--peft_config", str(tmp_path))
    assert training.end(limit=300) == [0, 0], training.output
    # A step of warm-up whose rate is 0: the run ends with what it began with.
    flags += " --max_steps 1 --warmup_steps 1 --eval_steps 1 --save_steps 1 --merge_adapter true --preflight false"
    going_on = Training(tmp_path / "on", *flags.split(), "--adapter", str(tmp_path / "run" / "model"))
    assert going_on.end(limit=300) == [0, 0], going_on.output
    assert f"and the model with its adapters merged in {tmp_path}/on/model" in going_on.output
    evaluated, again = (eval_loss(tmp_path / name) for name in ("run", "on"))

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    held_out = load_training_data(config, load_tokenizer(config, load_model_config(config.model))).held_out
    assert held_out is not None
    (batch,) = EvalLoader(held_out, Topology(0, 1, 1), micro_batch_size=3)

    @torch.no_grad()
    def loss(model: Any) -> float:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten()).item()

    before = loss(base)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "model"))
    assert loss(adapted) == pytest.approx(evaluated, rel=1e-5)
    assert evaluated < before - 0.01
    # Trained on by --adapter.
    assert again == evaluated
    for flag, name in (([], "alone"), (["--merge_adapter"], "merged")):
        assert export([str(tmp_path / "on"), str(tmp_path / name), *flag]) == 0
    saved, loaded = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run/model", "alone"))
    assert saved.keys() == loaded.keys()
    assert all(tensor.equal(loaded[name]) for name, tensor in saved.items())
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == model.state_dict().keys()
    for folder in ("on/model", "merged"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert not (tmp_path / folder / "adapter_config.json").exists()
        ids = batch["input_ids"]
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_a_trained_adapter_is_not_begun_anew(tmp_path: Path, weights: str) -> None:
    file = write(tmp_path, LORA)
    (tmp_path / weights).touch()
    for path in (tmp_path, file):
        with pytest.raises(ValueError, match=rf"has been trained, {weights}, .*; allowed: its adapter_config\.json in"):
            load_peft_config(str(path))

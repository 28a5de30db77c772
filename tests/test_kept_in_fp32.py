"""What transformers keeps in fp32 stays so under DeepSpeed in 16 bits: in steps, checkpoints and exports."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from error_budget import relative_errors
from kept_models import BIAS, MODELS, ROUTER, kept_model, save_kept_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from steps import build_engine, zero_block
from tiers import slow_but_for
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from mst_ds.adapters import model_on_meta
from mst_ds.checkpoint import CheckpointWriter, load_checkpoint, newest_checkpoint
from mst_ds.checkpoint.export import export_checkpoint, export_model
from mst_ds.checkpoint.identity import Identity
from mst_ds.config_parser import parse_train_config
from mst_ds.data.tokenizer import byte_tokenizer
from mst_ds.engine import Launch, prepare
from mst_ds.kept_in_fp32 import Loading, fp32_parameters, keep_in_fp32, kept_in_fp32, require_no_adapters_on

IDS = torch.arange(64)[None] * 7 % 256


@pytest.mark.parametrize("name", MODELS)
def test_the_names_are_those_that_transformers_loads_in_fp32(name: str, tmp_path: Path) -> None:
    folder = save_kept_model(name, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    loaded = [name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32]
    assert sorted(kept_in_fp32(model_on_meta(model.config, None)[0], torch.bfloat16)) == sorted(loaded)
    assert loaded
    assert kept_in_fp32(model, torch.float32) == []


def test_some_are_kept_in_fp32_beside_fp16_alone() -> None:
    config = GptOssConfig(num_hidden_layers=1, hidden_size=8, intermediate_size=8, num_local_experts=2, vocab_size=9)
    model = model_on_meta(config, None)[0]
    assert kept_in_fp32(model, torch.bfloat16) == []
    assert "model.layers.0.input_layernorm.weight" in kept_in_fp32(model, torch.float16)


def test_adapters_on_what_is_kept_in_fp32_are_refused(tmp_path: Path) -> None:
    model = kept_model("ernie4.5-moe")
    names = kept_in_fp32(model, torch.bfloat16)
    elsewhere = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    require_no_adapters_on(names, get_peft_model(copy.deepcopy(model), elsewhere))
    for settings in ({"target_parameters": ["mlp.gate.weight"]}, {"modules_to_save": ["gate"]}):
        config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings)
        with pytest.raises(ValueError, match="which transformers keeps in fp32"):
            require_no_adapters_on(names, get_peft_model(copy.deepcopy(model), config))
    config.save_pretrained(tmp_path / "adapter")
    save_kept_model("ernie4.5-moe", tmp_path)
    ds_config = tmp_path / "ds.json"
    ds_config.write_text('{"bf16": {"enabled": true}, "zero_optimization": {"stage": 2}}', encoding="utf-8")
    flags = ["--model", str(tmp_path), "--peft_config", str(tmp_path / "adapter"), "--ds_config", str(ds_config)]
    with pytest.raises(ValueError, match="which transformers keeps in fp32"):
        prepare(parse_train_config([*flags, "--preflight", "false"]), Launch.from_environment({}))


def test_a_buffer_of_16_bits_is_taken_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ZeRO-3, where the newest transformers makes those of the models here in fp32 by itself."""
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_: None)
    value = torch.linspace(8, 8.02, 8)
    loading = Loading(["router.bias"], is_sharded=True)
    with loading.watch():
        model = nn.ModuleDict({"router": nn.Module()})
        model["router"].register_buffer("bias", torch.zeros(8, dtype=torch.bfloat16))
        model.load_state_dict({"router.bias": value})
    (kept,) = loading.kept(model)
    assert kept.value.equal(value)


def load_engine(source: Path, stage: int) -> Any:
    config = {"bf16": {"enabled": True}, "zero_optimization": zero_block(stage)}
    zero3 = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, **config}) if stage == 3 else None
    plain = kept_model(source.name)
    loading = Loading(kept_in_fp32(plain, torch.bfloat16), is_sharded=zero3 is not None)
    with loading.watch():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    for name, parameter in plain.named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    kept = loading.kept(model)
    engine = build_engine(model.train(), **config)
    keep_in_fp32(engine, kept)
    return engine


def step(engine: Any) -> tuple[float, dict[str, Tensor]]:
    from deepspeed.utils import safe_get_full_grad

    loss = engine(input_ids=IDS, labels=IDS).loss
    engine.backward(loss)
    trained = {name: each for name, each in engine.module.named_parameters() if each.requires_grad}
    gradients = {name: safe_get_full_grad(each).double().clone() for name, each in trained.items()}
    engine.step()
    return loss.item(), gradients


def train_and_resume(rank: int, source: Path, folder: Path, stage: int) -> tuple[Any, list[float], list[float]]:
    """The first step, the last ones of a run, and the same of one that goes on from the run's checkpoint."""
    engine = load_engine(source, stage)
    tokenizer = byte_tokenizer()
    first = step(engine)
    identity = Identity.of(engine.module.config, None, tokenizer, dtype="bf16", zero_stage=stage, training={})
    writer = CheckpointWriter(folder / "checkpoints", 1, identity, tokenizer, source=str(source))
    writer.save(engine, step=1, data={})
    last = [step(engine)[0] for _ in range(2)]
    replace(writer, folder=folder / "checkpoints-at-the-end").save(engine, step=3, data={})
    export_model(engine, tokenizer, folder / "model", source=str(source))
    resumed = load_engine(source, stage)
    for value in fp32_parameters(resumed.module).values():
        value.zero_()
    checkpoint = newest_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    load_checkpoint(resumed, checkpoint, seed=0)
    again = [step(resumed)[0] for _ in range(2)]
    export_model(resumed, tokenizer, folder / "resumed", source=str(source))
    return first, last, again


def plain_gradients(source: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    # The other implementations of experts have no fp64.
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, experts_implementation="eager").train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: each.grad.double() for name, each in model.named_parameters() if each.grad is not None}


RUNS = [("ernie4.5-moe", 2), ("ernie4.5-moe", 3), ("glm4-moe", 3)]


@pytest.mark.parametrize("case", slow_but_for([("ernie4.5-moe", 3)], RUNS), ids=str)
def test_a_run_its_checkpoint_and_its_export(case: tuple[str, int], tmp_path: Path) -> None:
    name, stage = case
    source = save_kept_model(name, tmp_path / name)
    (first_loss, gradients), last, again = run_ranks(train_and_resume, 2, source, tmp_path, stage)[0]
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert first_loss == plain(input_ids=IDS, labels=IDS).loss.item()
    assert last == again
    exact = plain_gradients(source, torch.float64)
    plain_errors = relative_errors(plain_gradients(source, torch.bfloat16), exact)
    own_errors = relative_errors(gradients, exact)
    # A router's gradient passes through DeepSpeed in bf16, of which half a unit is 2 ** -9.
    assert all(own_errors[each] <= plain_errors[each] * 1.05 + 2**-8 for each in exact), (own_errors, plain_errors)
    checkpoint = newest_checkpoint(tmp_path / "checkpoints-at-the-end")
    assert checkpoint is not None
    export_checkpoint(checkpoint, tmp_path / "exported")
    states = [load_file(tmp_path / each / "model.safetensors") for each in ("model", "resumed", "exported")]
    before = load_file(source / "model.safetensors")
    for state in states:
        assert state.keys() == before.keys()
        assert {key: value.dtype for key, value in state.items()} == {key: value.dtype for key, value in before.items()}
        assert all(value.equal(states[0][key]) for key, value in state.items())
        assert all(value.equal(before[key]) for key, value in state.items() if key.endswith(BIAS))
    if name == "ernie4.5-moe":
        router = states[0][ROUTER]
        assert not router.equal(before[ROUTER])
        assert not router.equal(router.bfloat16().float())

"""`--lora_r`, `--adapter` and `--merge_adapter` as flags: what they mean, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapted import ATTENTION, EMBEDDINGS, HEAD, MLP, adapted, lora
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from mst_ds.adapters import model_on_meta, requested_config, require_mergeable
from mst_ds.checkpoint.export import merged_state
from mst_ds.config_parser import parse_train_config
from mst_ds.engine.preparation import _of_rate
from mst_ds.model_folder import find_adapter


def asked(*flags: str) -> Any:
    return requested_config(parse_train_config(flags).adapters)


def test_lora_has_the_defaults_of_trl() -> None:
    config = asked("--lora_r", "16")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.05)
    assert (config.target_modules, config.task_type) == ("all-linear", "CAUSAL_LM")
    assert asked() is None


@pytest.mark.parametrize("way", ["words", "commas", "file"])
def test_lora_by_flags_is_that_of_peft(way: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("lora_r: 4\nlora_target_modules: q_proj,down_proj", encoding="utf-8")
    flags = [
        "--lora_r",
        "4",
        "--lora_target_modules",
        *(["q_proj", "down_proj"] if way == "words" else ["q_proj,down_proj"]),
    ]
    config = asked(*(["--config", str(tmp_path / "run.yaml")] if way == "file" else flags), "--seed", "3")
    model = tiny_llama()
    _, found = model_on_meta(model.config, config)
    expected = get_peft_model(model, lora(r=4, target_modules=["q_proj", "down_proj"]))
    names = [{name for name, each in one.named_parameters() if each.requires_grad} for one in (found, expected)]
    assert names[0] == names[1]
    assert len(names[0]) == 8


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora_r=0"], "lora_r is 0; allowed: a whole number from 1 to"),
        (["--lora_r=4", "--lora_alpha=0"], "lora_alpha is 0; allowed"),
        (["--lora_r=4", "--lora_dropout=1"], "lora_dropout is 1.0; allowed"),
        (["--lora_r=4", "--lora_target_modules="], "lora_target_modules is ''; allowed"),
        (["--lora_dropout=0.1"], "lora_dropout is 0.1, but no lora_r asks for LoRA"),
        (["--lora_r=4", "--peft_config=x"], "peft_config and lora_r each say which adapters are trained"),
        (["--adapter=x", "--peft_config=x"], "peft_config and adapter each say which adapters are trained"),
        (["--merge_adapter=true"], "merge_adapter is true, but no adapters are trained; allowed: --lora_r"),
    ],
)
def test_flags_that_are_refused(flags: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        parse_train_config(flags)
    assert "\n" not in str(error.value)


def save_adapter(folder: Path, **adapter: Any) -> Path:
    adapted("llama", adapter).save_pretrained(folder)
    return folder / "adapter_model.safetensors"


@pytest.mark.parametrize("target", [ATTENTION, [*MLP, *HEAD]], ids=["attention", "mlp and head"])
def test_a_saved_adapter_is_loaded_bit_by_bit(tmp_path: Path, target: list[str]) -> None:
    saved = load_file(save_adapter(tmp_path, target_modules=target))
    model = get_peft_model(adapted("llama", {"target_modules": target}).unload(), lora(target_modules=target))
    adapter = find_adapter(str(tmp_path))
    adapter.require_match(model)
    adapter.load_into(model)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert saved.keys() == again.keys()
    assert all(tensor.equal(again[name]) for name, tensor in saved.items())


@pytest.mark.parametrize("case", ["missing", "another", "shape", "no weights", "no config"])
def test_an_adapter_of_another_model_is_refused(tmp_path: Path, case: str) -> None:
    file = save_adapter(tmp_path, target_modules=ATTENTION)
    state = load_file(file)
    name = min(state)
    changed = {
        "missing": {key: tensor for key, tensor in state.items() if key != name},
        "another": state | {"base_model.model.extra": torch.ones(1)},
        "shape": state | {name: state[name][:2].contiguous()},
    }
    save_file(changed.get(case, state), file)
    if case == "no weights":
        file.unlink()
    if case == "no config":
        (tmp_path / "adapter_config.json").unlink()
    says = {
        "missing": rf"not one of this model: it lacks {name}; allowed",
        "another": "it has base_model.model.extra too; allowed",
        "shape": r"of \(2, .*not \(4, ",
        "no weights": "has no adapter_model.safetensors or adapter_model.bin; allowed",
        "no config": "has no adapter_config.json; allowed",
    }
    with pytest.raises(ValueError, match=says[case]) as error:
        find_adapter(str(tmp_path)).require_match(adapted("llama", {"target_modules": ATTENTION}))
    assert "\n" not in str(error.value)


def test_weights_are_merged_in_fp32_and_rounded_once() -> None:
    model = adapted("llama", {"target_modules": ["q_proj"]}).bfloat16()
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    _, merged = merged_state(model.get_base_model().config, model.active_peft_config, state)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    weight, a, b = (
        state[f"{prefix}.{name}.weight"].float() for name in ("base_layer", "lora_A.default", "lora_B.default")
    )
    assert merged["model.layers.0.self_attn.q_proj.weight"].equal((weight + 2 * (b @ a)).bfloat16())
    assert merged["lm_head.weight"].equal(state["base_model.model.lm_head.weight"])


@pytest.mark.parametrize(
    ("architecture", "adapter", "says"),
    [
        ("llama", {"target_modules": MLP, "lora_bias": True}, "cannot be built: RuntimeError: Impossible to merge"),
        ("llama-bias-tied", {"target_modules": HEAD}, "the adapters change lm_head, whose weight is tied"),
        ("llama-bias-tied", {"target_modules": MLP, "modules_to_save": EMBEDDINGS}, "change model.embed_tokens, whose"),
        ("llama-bias-tied", {"target_modules": MLP}, None),
    ],
)
def test_what_cannot_be_merged_is_refused(architecture: str, adapter: dict[str, Any], says: str | None) -> None:
    config = adapted(architecture, adapter).get_base_model().config
    if says is None:
        require_mergeable(config, lora(**adapter))
        return
    with pytest.raises(ValueError, match=says) as error:
        require_mergeable(config, lora(**adapter))
    assert "\n" not in str(error.value)


def test_the_default_rate_of_adapters_is_said() -> None:
    of_adapters = ["--lora_r", "4", "--model", "owner/model"]
    said = _of_rate(parse_train_config(of_adapters))
    assert said is not None
    assert said.startswith("the learning rate is 2e-05, the default, for adapters too; usual for LoRA are 1e-4 to 2e-4")
    for more in (["--learning_rate", "3e-5"], ["--objective", "dpo"], ["--model", "small_llama"]):
        assert _of_rate(parse_train_config([*of_adapters, *more])) is None
    assert _of_rate(parse_train_config(of_adapters[2:])) is None

"""Adapters of a multimodal model's language model: in files of the whole model's names, and none in its other parts."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal import CONFIGS, multimodal_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mst_ds.adapters import model_on_meta, saved_config
from mst_ds.model_folder import find_adapter, find_whole
from mst_ds.model_folder.whole import WholeModel
from mst_ds.model_folder.whole_adapter import adapter_of_whole
from mst_ds.model_shape import language_config

IDS = torch.arange(40)[None]
# Names that modules of vision towers have, too.
EVERYWHERE: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "up_proj"]}
# One layer, another rank by its whole name, and the head, which is trained itself.
PICKED = {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [1], "modules_to_save": ["lm_head"]}
PICKED |= {"rank_pattern": {"model.layers.1.self_attn.o_proj": 3}}
CASES = [("gemma3", EVERYWHERE), ("llama4", EVERYWHERE), ("qwen3_5", PICKED), ("llama4", PICKED)]


def saved(name: str, folder: Path, **settings: Any) -> tuple[WholeModel, PeftModel]:
    """An adapter of random weights, as a run writes it, and the language model that has it."""
    config = CONFIGS[name]()
    alone = language_config(config)
    whole = find_whole(None, config, alone, dtype=torch.float32)
    parts = multimodal_model(name).state_dict()
    language = AutoModelForCausalLM.from_config(alone)
    with torch.no_grad():
        for own, tensor in language.state_dict().items():
            place = next(place for part, place in whole.places.items() if own.startswith(part))
            part = next(part for part in whole.places if own.startswith(part))
            tensor.copy_(parts[f"{place}.{own.removeprefix(part).removeprefix('.')}"])
    adapted: Any = get_peft_model(language, LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.save_pretrained(str(folder))
    adapter_of_whole(folder, whole.places, adapted.base_model.targeted_module_names)
    return whole, adapted.eval()


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_the_whole_model_reads_it(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    _, adapted = saved(name, tmp_path, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing.*")
        whole: Any = PeftModel.from_pretrained(multimodal_model(name), tmp_path).eval()
    names = {each for each, _ in whole.named_parameters() if "lora_" in each}
    assert len(names) == sum("lora_" in each for each, _ in adapted.named_parameters()) > 0
    assert all("language_model" in each for each in names)
    with torch.no_grad():
        assert whole(input_ids=IDS).logits.equal(adapted(input_ids=IDS).logits)
        with whole.disable_adapter():
            assert not whole(input_ids=IDS).logits.equal(adapted(input_ids=IDS).logits)


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_a_run_goes_on_with_it(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    whole, adapted = saved(name, tmp_path, **settings)
    config = saved_config(str(tmp_path))
    adapter = find_adapter(str(tmp_path), whole)
    _, on_meta = model_on_meta(language_config(whole.config), config)
    adapter.require_match(on_meta)  # type: ignore[arg-type]
    assert {each for each, _ in on_meta.named_parameters()} == {each for each, _ in adapted.named_parameters()}
    again: Any = get_peft_model(AutoModelForCausalLM.from_config(language_config(whole.config)), config)
    adapter.load_into(again)
    expected = {each: value for each, value in adapted.named_parameters() if value.requires_grad}
    for each, value in again.named_parameters():
        assert each not in expected or value.equal(expected[each]), each


def test_names_of_the_language_model_are_read_too(tmp_path: Path) -> None:
    """Of an adapter that was trained on the language model alone."""
    whole, adapted = saved("gemma3", tmp_path / "whole", **EVERYWHERE)
    adapted.save_pretrained(str(tmp_path / "own"))
    found, expected = (find_adapter(str(tmp_path / each), whole).headers.keys() for each in ("own", "whole"))
    assert found == expected
    files = [load_file(tmp_path / each / "adapter_model.safetensors").keys() for each in ("own", "whole")]
    assert not files[0] & files[1]
    assert isinstance(json.loads((tmp_path / "own" / "adapter_config.json").read_text())["target_modules"], list)

"""Which config a name means: a shipped one, a folder, a published model whose shape is known, or one of the hub."""

import json
import logging
from contextlib import nullcontext

import pytest
import torch
import transformers
from processes import ROOT
from test_model_shape import SMALL, parameter_count

from mst_ds.model_shape import (
    ModelShape,
    known_model_names,
    load_model_config,
    load_model_shape,
    shipped_model_config,
)


def test_the_shipped_config_builds_a_model():
    config = load_model_config("small_llama")
    assert config.model_type == "llama"
    assert not config.use_cache
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert ModelShape.from_config(config).parameter_count == parameter_count(model)


def test_shipped_names():
    folder = shipped_model_config("small_llama")
    assert folder is not None
    assert (folder / "config.json").is_file()
    for name in ("small_lama", "", "..", "small_llama/.."):
        assert shipped_model_config(name) is None


def test_a_folder_is_read(tmp_path):
    transformers.Qwen3Config(**SMALL).save_pretrained(tmp_path)
    assert load_model_config(str(tmp_path)).model_type == "qwen3"


def test_a_folder_that_holds_no_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_model_config(str(tmp_path))
    (tmp_path / "small.gguf").touch()
    with pytest.raises(ValueError, match=r"has GGUF files and no config.json; allowed: .* as save_pretrained"):
        load_model_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json cannot be read: ") as error:
        load_model_config(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_model_that_is_nowhere_is_refused(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = "model 'small_lama' was not found; nearest: 'small_llama'; allowed: a shipped config"
    with pytest.raises(ValueError, match=message) as error:
        load_model_config("small_lama")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("is_found", [True, False])
def test_what_the_hub_logs_is_said_only_of_a_model_that_is_found(monkeypatch, is_found):
    logger, said = logging.getLogger("huggingface_hub.utils._http"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())

    def from_pretrained(name, **_):
        logger.warning("Retrying")
        if not is_found:
            raise OSError("no connection")
        return transformers.LlamaConfig(**SMALL)

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    logger.addHandler(handler)
    try:
        with nullcontext() if is_found else pytest.raises(ValueError, match="model 'a/b' was not found"):
            load_model_config("a/b")
    finally:
        logger.removeHandler(handler)
    assert said == ["Retrying"] * is_found


# As the models' pages on the hub count them.
KNOWN_PARAMETERS = {
    "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "google/gemma-2-9b": 9_241_705_984,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.3": 7_248_023_552,
}


SAME_SHAPE = {
    "Qwen/Qwen3-8B-Base": "Qwen/Qwen3-8B",
    "google/gemma-2-9b-it": "google/gemma-2-9b",
    "meta-llama/Llama-3.1-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "meta-llama/Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B",
    "meta-llama/Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B",
    "meta-llama/Llama-3.2-3B-Instruct": "meta-llama/Llama-3.2-3B",
    "meta-llama/Llama-3.3-70B-Instruct": "meta-llama/Llama-3.1-70B",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistralai/Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.3": "mistralai/Mistral-7B-v0.3",
}


def test_known_models_have_their_published_size():
    published = KNOWN_PARAMETERS | {name: KNOWN_PARAMETERS[other] for name, other in SAME_SHAPE.items()}
    assert {name: load_model_shape(name).parameter_count for name in known_model_names()} == published


def test_known_models_have_the_shape_of_the_model_they_were_made_from():
    assert all(load_model_shape(name) == load_model_shape(other) for name, other in SAME_SHAPE.items())


def test_only_the_first_mistral_has_a_window():
    windows = {name: set(load_model_shape(name).sliding_windows) for name in known_model_names() if "Mistral" in name}
    assert windows == {name: {4096} if name.endswith("v0.1") else set() for name in windows}


@pytest.mark.parametrize("name", KNOWN_PARAMETERS)
def test_a_known_model_is_what_transformers_would_read(name):
    """No field is left out for which transformers has a default that is not None."""
    fields = json.loads((ROOT / "mst_ds" / "model_shape" / "known_models.json").read_text())[name]
    assert load_model_shape(name) == ModelShape.from_config(transformers.AutoConfig.for_model(**fields))


def test_any_other_model_is_read_from_its_config(tmp_path):
    config = transformers.Qwen3Config(**SMALL)
    config.save_pretrained(tmp_path)
    assert load_model_shape(str(tmp_path)) == ModelShape.from_config(config)
    assert load_model_shape("small_llama") == ModelShape.from_config(load_model_config("small_llama"))

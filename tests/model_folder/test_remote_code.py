"""Code that a model or tokenizer brings itself runs when it is asked for, and nobody is asked on standard input."""

from __future__ import annotations

import builtins
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from folders import CONFIG, change_config, llama_folder
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mst_ds.adapters import model_on_meta
from mst_ds.config import TrainConfig
from mst_ds.data.tokenizer import byte_tokenizer, load_tokenizer
from mst_ds.model_folder import find_weights, load_model, require_match
from mst_ds.model_shape import load_model_config, load_model_shape

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is there once a model's code has run."""
    asked: list[str] = []

    def answer(prompt: str = "") -> str:
        asked.append(prompt)  # an error here would be taken for one of the terminal's
        return "n"

    monkeypatch.setattr(builtins, "input", answer)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield tmp_path / "it_ran"
    assert asked == []


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    folder = llama_folder(tmp_path / "model", vocab_size=264)
    byte_tokenizer().save_pretrained(folder)
    (folder / "own.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    return folder


OWN_MODEL = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}


def test_a_model_that_needs_code(folder: Path, marker: Path) -> None:
    change_config(folder, model_type="own_llama", auto_map=OWN_MODEL)
    for read in (load_model_config, load_model_shape):
        with pytest.raises(
            ValueError, match=r"needs code that it brings .*; allowed: --trust_remote_code true"
        ) as error:
            read(str(folder))
        assert "\n" not in str(error.value)
    assert not marker.exists()
    config = load_model_config(str(folder), trust_remote_code=True)
    assert marker.exists()
    # Whoever makes a model of it from here on makes the same.
    on_meta, _ = model_on_meta(config, None)
    weights = find_weights(str(folder))
    assert weights is not None
    assert require_match(weights, on_meta, dtype=torch.float32) == ()
    model = load_model(weights, config, type(on_meta), dtype=torch.float32)
    assert type(model).__name__ == "OwnModel"
    model.save_pretrained(folder.with_name("saved"))
    assert (folder.with_name("saved") / "own.py").is_file()


def test_code_that_is_not_needed(folder: Path, marker: Path) -> None:
    """Of a model that transformers knows, too: its own takes the code's place."""
    change_config(folder, auto_map=OWN_MODEL)
    model, _ = model_on_meta(load_model_config(str(folder)), None)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not marker.exists()


def test_a_class_that_transformers_has_only_the_config_of(folder: Path, marker: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    # A vision encoder: its config is known, and no language model has it.
    kept = {"model_type": "vit", "auto_map": {"AutoModelForCausalLM": OWN_MODEL["AutoModelForCausalLM"]}}
    (folder / CONFIG).write_text(json.dumps({"hidden_size": fields["hidden_size"]} | kept), encoding="utf-8")
    with pytest.raises(ValueError, match="needs code that it brings"):
        load_model_config(str(folder))
    assert not marker.exists()


@pytest.mark.parametrize("attention", ["somebody/kernel", "paged|somebody/kernel", "kernels-community/flash-attn2"])
def test_attention_that_is_a_kernel_of_the_hub(folder: Path, attention: str) -> None:
    change_config(folder, attn_implementation=attention)
    with pytest.raises(ValueError, match=r"needs code that it brings itself, which is not run; allowed: --trust"):
        load_model_config(str(folder))
    load_model_config(str(folder), trust_remote_code=True)


def test_a_tokenizer_that_needs_code(folder: Path, marker: Path) -> None:
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    file.write_text(json.dumps(fields), encoding="utf-8")
    config = TrainConfig(model=str(folder))
    with pytest.raises(
        ValueError, match=r"tokenizer .* needs code that it brings itself, which is not run; allowed: --trust"
    ):
        load_tokenizer(config, LlamaConfig(vocab_size=264))
    assert not marker.exists()
    config.trust_remote_code = True
    assert type(load_tokenizer(config, LlamaConfig(vocab_size=264))).__name__ == "OwnTokenizer"
    assert marker.exists()


@pytest.fixture(autouse=True)
def _nothing_stays_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes that a test registers are known to transformers in this process, for every test after it."""
    for mapping in (AutoModelForCausalLM._model_mapping, AutoConfig):
        if hasattr(mapping, "_extra_content"):
            monkeypatch.setattr(mapping, "_extra_content", dict(mapping._extra_content))
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setattr(CONFIG_MAPPING, "_extra_content", dict(CONFIG_MAPPING._extra_content))

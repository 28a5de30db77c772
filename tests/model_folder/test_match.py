"""Weights are those that the config describes, or refused with the names of what differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import WEIGHTS, change_config, change_weights, llama_folder
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, tiny_model
from torch import Tensor

from mst_ds.adapters import model_on_meta
from mst_ds.model_folder import ModelLayout, find_weights, load_model, require_match
from mst_ds.model_shape import load_model_config

Tensors = dict[str, Tensor]


def match(folder: Path, **settings: Any) -> tuple[str, ...]:
    weights = find_weights(str(folder))
    assert weights is not None
    model, _ = model_on_meta(load_model_config(str(folder)), None)
    return require_match(weights, model, **{"dtype": torch.float32, **settings})


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def more_layers(tensors: Tensors) -> Tensors:
    return tensors | {name.replace(".1.", ".2."): tensor.clone() for name, tensor in tensors.items() if ".1." in name}


def renamed(tensors: Tensors) -> Tensors:
    return {f"transformer.{name}": tensor for name, tensor in tensors.items()}


HEAD = "lm_head.weight"
NORM = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "fields", "says"),
    [
        (
            without(NORM, "model.layers.0.mlp.up_proj.weight"),
            {},
            "2 missing: model.layers.0.mlp.up_proj.weight, model.norm",
        ),
        (without(HEAD), {}, r"1 missing: lm_head\.weight\).*, or --new_lm_head true"),
        (
            without(HEAD, NORM),
            {},
            r"2 missing: lm_head\.weight, model\.norm\.weight\); allowed: weights and config of one model$",
        ),
        (renamed, {}, r"21 missing: lm_head.* and 18 more; 21 of no use to the model: transformer\."),
        (more_layers, {}, r"9 of no use to the model: model\.layers\.2\."),
        (None, {"num_hidden_layers": 3}, r"9 missing: model\.layers\.2\."),
        (
            None,
            {"intermediate_size": 64},
            r"of another shape: model\.layers\.0\.mlp\.down_proj\.weight \(48, 96\) for \(48, 64\)",
        ),
        (cast(torch.int8), {}, r"not of floating point, but int8 \(21 of them"),
        (cast(torch.float8_e4m3fn), {}, "not of floating point, but float8_e4m3fn"),
        (
            None,
            {"tie_word_embeddings": True},
            r"ties lm_head\.weight to model\.embed_tokens\.weight, but .* two that differ",
        ),
    ],
)
def test_weights_that_are_refused(
    tmp_path: Path, change: Callable[[Tensors], Mapping[str, Tensor]] | None, fields: dict[str, Any], says: str
) -> None:
    folder = llama_folder(tmp_path / "model")
    if change is not None:
        change_weights(folder, change)
    change_config(folder, **fields)
    with pytest.raises(ValueError, match=says) as error:
        match(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"watermarking_config": 3}', '{"cache_implementation": "unheard of"}']
)
def test_a_generation_config_that_is_none(tmp_path: Path, content: str) -> None:
    """transformers would find it when the processes have met."""
    (llama_folder(tmp_path) / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^generation_config\.json of model .* cannot be read .*; allowed: ") as error:
        match(tmp_path)
    assert "\n" not in str(error.value)


def test_experts_that_do_not_fit_together(tmp_path: Path) -> None:
    tiny_model("mixtral").float().save_pretrained(tmp_path)
    change_weights(tmp_path, without("model.layers.1.block_sparse_moe.experts.2.w1.weight"))
    with pytest.raises(ValueError, match=r"1 not of one shape .*: model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        match(tmp_path)


# Renamed and merged on loading, tied, with masks that are whole numbers, and those of which nothing is special.
@pytest.mark.parametrize(
    "name", ["mixtral", "qwen3-moe", "gpt-oss", "deepseek-v3", "llama-bias-tied", "gpt2", "falcon"]
)
def test_no_fault_is_found_where_there_is_none(tmp_path: Path, name: str) -> None:
    assert name in ARCHITECTURES
    tiny_model(name).float().save_pretrained(tmp_path)
    if name == "gpt2":
        mask = torch.ones(1, 1, 64, 64, dtype=torch.uint8)
        change_weights(tmp_path, lambda tensors: tensors | {"transformer.h.0.attn.bias": mask})
    assert match(tmp_path) == ()


def test_float64_is_said(tmp_path: Path) -> None:
    change_weights(llama_folder(tmp_path), cast(torch.float64))
    assert match(tmp_path) == ("21 weights are float64, such as lm_head.weight; rounded to fp32",)


def test_two_equal_weights_that_are_tied(tmp_path: Path) -> None:
    llama_folder(tmp_path, tie_word_embeddings=True)
    change_weights(tmp_path, lambda tensors: tensors | {HEAD: tensors["model.embed_tokens.weight"].clone()})
    assert match(tmp_path) == ()


def test_a_new_head(tmp_path: Path) -> None:
    folder = llama_folder(tmp_path / "model")
    with pytest.raises(ValueError, match=r"new_lm_head is true, but model .* has a head"):
        match(folder, new_lm_head=True)
    change_weights(folder, without(HEAD))
    assert match(folder, new_lm_head=True) == ("the LM head starts from random values",)
    config, weights = load_model_config(str(folder)), find_weights(str(folder))
    model_class = type(model_on_meta(config, None)[0])
    model = load_model(weights, config, model_class, dtype=torch.float32, new_lm_head=True)
    head = model.get_output_embeddings().weight
    assert head.isfinite().all()
    assert 0.01 < head.std() < 0.03  # as initializer_range has it
    stored = load_file(folder / WEIGHTS)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in model.state_dict().items() if name != HEAD)
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight"):
        load_model(weights, config, model_class, dtype=torch.float32)


def test_a_model_that_is_not_the_one_that_was_checked(tmp_path: Path) -> None:
    config = load_model_config(str(llama_folder(tmp_path)))
    checked, model = (model_on_meta(config, None)[0] for _ in range(2))
    layout = ModelLayout.of(checked)
    layout.require_same(ModelLayout.of(model))
    model.model.norm = torch.nn.LayerNorm(48)
    with pytest.raises(
        ValueError, match=r"module model\.norm is LayerNorm, not LlamaRMSNorm; parameter model\.norm\.bias is"
    ) as error:
        layout.require_same(ModelLayout.of(model))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_that_are_saved_in_32_are_said(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = llama_folder(tmp_path)
    change_weights(folder, cast(dtype))
    (note,) = match(folder)
    assert f"weights are {'bf16' if dtype == torch.bfloat16 else 'fp16'}; trained and saved as fp32, twice" in note
    assert match(folder, dtype=dtype) == ()

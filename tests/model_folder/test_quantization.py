"""A quantised model is trained and saved as the plain one that it stands for, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_ranks
from folders import CONFIG, WEIGHTS, change_config, change_weights, fp8_folder, llama_folder, mxfp4_folder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config, PreTrainedModel

from mst_ds.adapters import model_on_meta
from mst_ds.model_folder import find_weights, load_model, require_match
from mst_ds.model_folder.quantization import Quantization
from mst_ds.model_shape import load_model_config, load_model_shape

MAKERS = {"mxfp4": mxfp4_folder, "fp8": fp8_folder}
DEQUANTISED: dict[str, Any] = {"mxfp4": Mxfp4Config(dequantize=True), "fp8": FineGrainedFP8Config(dequantize=True)}


def load(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, tuple[str, ...]]:
    config, weights = load_model_config(str(folder)), find_weights(str(folder))
    assert weights is not None
    on_meta, _ = model_on_meta(config, None)
    notes = require_match(weights, on_meta, dtype=dtype)
    return load_model(weights, config, type(on_meta), dtype=dtype), notes


def loss(model: PreTrainedModel) -> float:
    ids = torch.arange(40).reshape(1, 40)
    return model(ids, labels=ids).loss.item()


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_the_model_that_transformers_dequantises_and_saved_as_such(tmp_path: Path, name: str) -> None:
    folder = MAKERS[name](tmp_path / "model")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}', encoding="utf-8")
    model, notes = load(folder, torch.bfloat16)
    assert notes == (f"weights are {name.upper()}; trained and saved as bf16",)
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=DEQUANTISED[name])
    expected = truth.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert model.name_or_path == str(folder)
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / CONFIG).read_text(encoding="utf-8"))
    again, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values())
    assert loss(again) == loss(model) == loss(truth)
    assert again.generation_config.eos_token_id == [2, 5]


def blocks_by_hand(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    result = weight.float()
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            of_block = slice(row * block[0], (row + 1) * block[0]), slice(column * block[1], (column + 1) * block[1])
            result[of_block] *= scale[row, column]
    return result


def test_blocks_of_which_the_last_is_smaller() -> None:
    """48 rows in blocks of 32 have two scales, which transformers takes for blocks of 24."""
    torch.manual_seed(0)
    weight, scale = torch.randn(48, 40).to(torch.float8_e4m3fn), torch.rand(2, 3)
    quantization = Quantization("fp8", (32, 16))
    plain = quantization.dequantize({"w": weight, "w_scale_inv": scale, "w.activation_scale": scale}, torch.float32)
    assert plain.keys() == {"w"}
    assert torch.equal(plain["w"], blocks_by_hand(weight, scale, (32, 16)))
    exponents = torch.tensor([[120, 127, 130], [100, 126, 128]], dtype=torch.uint8)
    plain = quantization.dequantize({"w": weight, "w_scale_inv": exponents}, torch.float32)
    assert torch.equal(plain["w"], blocks_by_hand(weight, 2.0 ** (exponents.float() - 127), (32, 16)))
    plain = Quantization("fp8", None).dequantize({"w": weight, "w_scale_inv": torch.tensor(0.5)}, torch.float32)
    assert torch.equal(plain["w"], weight.float() / 2)


@pytest.mark.parametrize(
    ("make", "change", "says"),
    [
        (
            fp8_folder,
            lambda t: t | {"model.norm.weight_scale_inv": torch.ones(1, 1)},
            "has a scale, but is in bfloat16",
        ),
        (fp8_folder, lambda t: t | {"a.weight_scale_inv": torch.ones(1, 1)}, "has no weight a.weight"),
        (fp8_folder, lambda t: {n: x for n, x in t.items() if "up_proj.weight_s" not in n}, "not of floating point"),
        (fp8_folder, lambda t: {n: x[:1] if "_scale" in n else x for n, x in t.items()}, "for blocks of 16 by 16"),
        (mxfp4_folder, lambda t: {n: x for n, x in t.items() if "_scales" not in n}, "lack their _scales"),
        (
            mxfp4_folder,
            lambda t: {n: x[:, :-1].contiguous() if "_scales" in n else x for n, x in t.items()},
            "in MXFP4 have blocks",
        ),
    ],
)
def test_quantised_weights_that_are_refused(
    tmp_path: Path, make: Callable[[Path], Path], change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    folder = make(tmp_path)
    change_weights(folder, change)
    with pytest.raises(ValueError, match=says) as error:
        load(folder, torch.float32)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "compressed-tensors"}, "'compressed-tensors'"),
        ({"load_in_4bit": True}, "'bitsandbytes'"),
        ({"bits": 4}, "'an unnamed method'"),
    ],
)
def test_a_method_that_is_refused_before_anything_runs(tmp_path: Path, fields: dict[str, Any], name: str) -> None:
    folder = llama_folder(tmp_path)
    change_config(folder, quantization_config=fields)
    for read in (load_model_config, load_model_shape):
        with pytest.raises(ValueError, match=f"quantised by {name}, which mst_ds does not train; allowed: mxfp4, fp8"):
            read(str(folder))


def _load_sharded(rank: int, folders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    from mst_ds.model_folder import ModelLayout

    gathered: dict[str, dict[str, Tensor]] = {}
    for name, folder in folders.items():
        zero3 = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
        config, weights = load_model_config(str(folder)), find_weights(str(folder))
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
        model = load_model(weights, config, model_class, dtype=torch.float32, new_lm_head=name == "new head")
        assert all(hasattr(parameter, "ds_shape") for parameter in model.parameters())
        gathered[name] = {}
        for of, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                gathered[name][of] = parameter.detach().clone()
        del zero3  # as transformers looks for it
        ModelLayout.of(model_on_meta(load_model_config(str(folder)), None)[0]).require_same(ModelLayout.of(model))
    return gathered


def test_sharded_from_the_start(tmp_path: Path) -> None:
    folders = {name: make(tmp_path / name) for name, make in MAKERS.items()}
    folders["tied"] = llama_folder(tmp_path / "tied", tie_word_embeddings=True)
    folders["new head"] = llama_folder(tmp_path / "new head")
    change_weights(folders["new head"], lambda t: {name: x for name, x in t.items() if name != "lm_head.weight"})
    first, second = run_ranks(_load_sharded, 2, folders)
    for name, folder in folders.items():
        assert all(torch.equal(tensor, second[name][of]) for of, tensor in first[name].items())
        if name in MAKERS:
            expected = load(folder, torch.float32)[0].state_dict()
        else:
            expected = load_file(folder / WEIGHTS)
        found = {of: tensor for of, tensor in first[name].items() if of in expected}
        assert len(found) == len(first[name]) - (name == "new head")
        assert all(torch.equal(tensor, expected[of]) for of, tensor in found.items())
    assert 0.01 < first["new head"]["lm_head.weight"].std() < 0.03

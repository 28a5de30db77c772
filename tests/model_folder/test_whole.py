"""The language model of a multimodal one: loaded from its files, written back into all of it under the same names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from folders import WEIGHTS, change_config, change_weights
from multimodal import CONFIGS, multimodal_folder, multimodal_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from mst_ds.adapters import model_on_meta
from mst_ds.model_folder import Weights, WholeModel, find_weights, find_whole, load_model, require_match, whole_on_meta
from mst_ds.model_folder.whole import REST_FILE
from mst_ds.model_folder.write import write_model
from mst_ds.model_shape import language_config, load_model_config

IDS = torch.arange(40)[None]
NORM = "model.norm.weight"


def matched(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Weights, WholeModel]:
    config = load_model_config(str(folder))
    weights = find_weights(str(folder))
    assert weights is not None
    require_match(weights, whole_on_meta(config), dtype=dtype)
    return weights, find_whole(weights, config, language_config(config), dtype=dtype)


def language_model(whole: WholeModel, weights: Weights | None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    config = language_config(whole.config)
    model_class = type(model_on_meta(config, None)[0])
    return load_model(weights, config, model_class, dtype=dtype, whole=whole).eval()


def trained(model: PreTrainedModel) -> dict[str, Tensor]:
    """A step of a run: the tensors as one gathers them, tied ones once."""
    for parameter in model.parameters():
        parameter.data += 0.01
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def written(whole: WholeModel, state: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    model, tensors = whole.joined(state)
    write_model(model, tensors, folder, write_files=lambda partial: None, has_stored_names=True)
    return load_file(folder / WEIGHTS)


def original(folder: Path) -> PreTrainedModel:
    """By plain transformers, with nothing missing and nothing over."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    loaded: PreTrainedModel = model.eval()
    return loaded


@pytest.mark.parametrize("name", CONFIGS)
def test_only_the_language_model_changes(name: str, tmp_path: Path) -> None:
    source = multimodal_folder(tmp_path / "source", name)
    weights, whole = matched(source)
    model = language_model(whole, weights)
    assert type(original(source)) is type(whole_on_meta(whole.config))
    with torch.no_grad():
        assert model(IDS).logits.equal(original(source)(IDS).logits)
        after = written(whole, trained(model), tmp_path / "model")
        assert original(tmp_path / "model")(IDS).logits.equal(model(IDS).logits)
    before = load_file(source / WEIGHTS)
    assert before.keys() == after.keys()
    language = {tensor_name for tensor_name in before if not before[tensor_name].equal(after[tensor_name])}
    assert language == set(whole.names.values())
    assert sum(tensor.numel() for tensor in model.parameters()) == sum(before[each].numel() for each in language)


@pytest.mark.parametrize("name", CONFIGS)
def test_random_weights_of_all_of_it(name: str, tmp_path: Path) -> None:
    """From a config alone: what is not trained is drawn as transformers draws it, the same every time."""
    config = CONFIGS[name]()
    whole = find_whole(None, config, language_config(config), dtype=torch.float32, seed=5)
    model = language_model(whole, None)
    after = written(whole, trained(model), tmp_path)
    with torch.no_grad():
        assert original(tmp_path)(IDS).logits.equal(model(IDS).logits)
    expected = load_file(multimodal_folder(tmp_path / "other", name) / WEIGHTS)
    assert after.keys() == expected.keys()
    rest = after.keys() - set(whole.names.values())
    assert rest
    for each in rest:
        norms = [float(tensors[each].norm()) for tensors in (after, expected)]
        # That of another draw of as many elements is about the same.
        assert norms[0] == pytest.approx(norms[1], rel=6 / math.sqrt(expected[each].numel()), abs=1e-6), each
    again = whole.rest(torch.float32)
    assert all(after[each].equal(again[each]) for each in rest)


def of_modules(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of the model's modules in transformers, which are not those that it saves."""
    return {name.replace("language_model.model.", "model.language_model."): each for name, each in tensors.items()}


def as_published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gemma 3's vision tower is one module further inside than in transformers now."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in tensors.items()}


def with_more(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers that predict further tokens, which transformers does not load."""
    return {**tensors, "mtp.norm.weight": torch.ones(3), "mtp.layers.0.mlp.up_proj.weight": torch.ones(3, 2)}


def with_fused_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """As Qwen 3.5 is published: the experts of a layer are one tensor."""
    model = multimodal_model("qwen3_5_moe")
    experts = {name: each for name, each in model.state_dict().items() if ".experts." in name}
    assert experts
    return {name: each for name, each in tensors.items() if ".experts." not in name} | experts


@pytest.mark.parametrize(
    ("name", "change"),
    [("gemma3", of_modules), ("gemma3", as_published), ("qwen3_5", with_more), ("qwen3_5_moe", with_fused_experts)],
)
def test_names_are_those_of_the_files(
    name: str, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], tmp_path: Path
) -> None:
    source = multimodal_folder(tmp_path / "source", name)
    change_weights(source, change)
    before = load_file(source / WEIGHTS)
    weights, whole = matched(source)
    after = written(whole, trained(language_model(whole, weights)), tmp_path / "model")
    assert before.keys() == after.keys()
    for each in before.keys() - set(whole.names.values()):
        assert before[each].equal(after[each]), each


def test_the_rest_keeps_its_dtype(tmp_path: Path) -> None:
    source = multimodal_folder(tmp_path / "source", "gemma3")
    weights, whole = matched(source, torch.bfloat16)
    after = written(whole, trained(language_model(whole, weights, torch.bfloat16)), tmp_path / "model")
    language = set(whole.names.values())
    assert {tensor.dtype for name, tensor in after.items() if name in language} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in after.items() if name not in language} == {torch.float32}
    assert original(tmp_path / "model").dtype == torch.bfloat16


def test_a_quantised_language_model(tmp_path: Path) -> None:
    """Dequantised on loading, as any model; the rest is plain in such files."""
    source = multimodal_folder(tmp_path / "source", "mistral3")

    def quantise(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in [name for name in tensors if "language_model" in name and "_proj" in name]:
            tensors[name] = tensors[name].clamp(-1, 1).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.tensor(0.5)
        return tensors

    change_weights(source, quantise)
    change_config(source, quantization_config={"quant_method": "fp8"})
    weights, whole = matched(source)
    before = load_file(source / WEIGHTS)
    after = written(whole, trained(language_model(whole, weights)), tmp_path / "model")
    assert after.keys() == {name for name in before if not name.endswith("_scale_inv")}
    for name, tensor in after.items():
        stored = before[name].float() * (0.5 if name + "_scale_inv" in before else 1.0)
        assert tensor.equal(stored + 0.01 if name in whole.names.values() else stored), name
    original(tmp_path / "model")


def test_a_checkpoint_keeps_the_rest(tmp_path: Path) -> None:
    """Without the files that it came from."""
    source = multimodal_folder(tmp_path / "source", "gemma3")
    weights, whole = matched(source)
    state = trained(language_model(whole, weights))
    expected = written(whole, state, tmp_path / "model")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    whole.write_rest(checkpoint, torch.float32)
    (source / WEIGHTS).unlink()
    kept = WholeModel.of_checkpoint(checkpoint, whole.config)
    assert kept is not None
    found = written(kept, state, tmp_path / "exported")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(expected[name]) for name in found)
    (checkpoint / REST_FILE).unlink()
    assert WholeModel.of_checkpoint(checkpoint, whole.config) is None


@pytest.mark.parametrize(
    ("lacks", "says"),
    [
        ("vision_tower.embeddings.patch_embedding.weight", "1 missing: model.vision_tower"),
        ("language_model.model.norm.weight", r"1 missing: model\.language_model\.norm\.weight"),
    ],
)
def test_what_is_missing_is_refused(lacks: str, says: str, tmp_path: Path) -> None:
    source = multimodal_folder(tmp_path, "gemma3")
    change_weights(source, lambda tensors: {name: each for name, each in tensors.items() if name != lacks})
    with pytest.raises(ValueError, match=says):
        matched(source)


def test_a_model_whose_language_model_is_none_of_its_own_is_refused() -> None:
    """Qwen2-VL's is made of other modules than the class that transformers has for text."""
    config = AutoConfig.for_model("qwen3_5")
    language = language_config(CONFIGS["gemma3"]())
    with pytest.raises(ValueError, match="Qwen3_5ForConditionalGeneration is multimodal and has 0 modules like model"):
        find_whole(None, config, language, dtype=torch.float32)

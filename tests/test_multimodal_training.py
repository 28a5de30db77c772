"""A multimodal checkpoint trained on text: the steps are those of its own class, and what is saved is of that class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal import CONFIGS, multimodal_folder, multimodal_model
from plain_model import assert_close, loss_and_gradients
from safetensors.torch import load_file
from trainings import Training, losses
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.mistral3.modeling_mistral3 import Mistral3Model

from mst_ds.commands.export import main as export
from mst_ds.commands.preflight import main as preflight
from mst_ds.config_parser import parse_train_config
from mst_ds.data import byte_tokenizer, load_tokenizer, load_training_data
from mst_ds.engine import Launch, prepare
from mst_ds.model_shape import load_model_config
from mst_ds.patching.apply import apply_settings
from mst_ds.settings import Settings

OF_PROCESSOR = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
STEPS = 2


def flags(folder: Path, source: Path, stage: int, *more: str, sp_size: int = 1) -> list[str]:
    """Steps on one text, with a rate that moves every weight."""
    (folder / "text.txt").write_text("The text alone is learned; what sees stays as it is.", encoding="utf-8")
    mst = {"sp_size": sp_size, "device_memory_gib": 4, "mlp_chunks": 2, "loss_chunks": 2}
    ds_config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}, "mst": mst}
    (folder / "ds.json").write_text(json.dumps(ds_config), encoding="utf-8")
    own = ["--ds_config", str(folder / "ds.json"), "--model", str(source), "--dataset", str(folder / "text.txt")]
    own += ["--seq_len", "64", "--packing", "none", "--max_steps", str(STEPS), "--learning_rate", "1e-2"]
    return [*own, "--weight_decay", "0", "--lr_scheduler_type", "constant", "--warmup_steps", "0", *more]


def plain_losses(given: list[str]) -> tuple[list[float], PreTrainedModel]:
    """Of the original class in transformers, whose language model alone is trained; and that class after the steps."""
    config = parse_train_config(given)
    data = load_training_data(config, load_tokenizer(config, load_model_config(config.model)))
    batch: dict[str, Any] = {name: data.train[0][name][None] for name in ("input_ids", "labels", "attention_mask")}
    model = AutoModelForImageTextToText.from_pretrained(config.model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name or "lm_head" in name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        found.append(float(loss_and_gradients(model, **batch)["loss"]))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    return found, model


def assert_trained(source: Path, saved: Path, expected: PreTrainedModel) -> None:
    """The saved folder is one of the original class, with all but its language model as it was, bit by bit."""
    before, after = (load_file(folder / "model.safetensors") for folder in (source, saved))
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not tensor.equal(after[name])}
    assert changed == {name for name in before if "language_model" in name or name == "lm_head.weight"}
    for name in ("generation_config.json", *OF_PROCESSOR):
        assert (saved / name).read_bytes() == (source / name).read_bytes()
    model, info = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert type(model) is type(expected)
    assert not any(info.values())
    trained = {name: weight.data for name, weight in expected.named_parameters() if weight.requires_grad}
    # What AdamW makes of gradients that differ in their last bits.
    assert_close({name: model.get_parameter(name).data for name in trained}, trained, 1e-2)
    prompt = byte_tokenizer()("The text", return_tensors="pt")["input_ids"]
    assert model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] == prompt.shape[1] + 4


@pytest.mark.slow
def test_gemma_3_on_two_ranks(tmp_path: Path) -> None:
    """Each weight and each sequence in parts; with its preflight. Its last checkpoint is the same model."""
    source = multimodal_folder(tmp_path / "source", "gemma3")
    given = flags(tmp_path, source, 3, "--save_steps", "1", sp_size=2)
    training = Training(tmp_path / "run", *given)
    assert training.end(limit=300) == [0, 0], training.output
    assert "its language model is trained, on text; the rest (vision_tower, multi_modal_projector)" in training.output
    expected, model = plain_losses(given)
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)
    assert_trained(source, tmp_path / "run" / "model", model)
    assert export([str(tmp_path / "run"), str(tmp_path / "exported")]) == 0
    written, exported = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (tmp_path / "run" / "model", tmp_path / "exported")
    )
    assert written == exported


def test_qwen_3_5_on_one_rank(tmp_path: Path) -> None:
    """In two parts, the second from the checkpoint of the first."""
    source = multimodal_folder(tmp_path / "source", "qwen3_5")
    given = flags(tmp_path, source, 1, "--preflight", "false", "--save_steps", "1")
    for last in (1, STEPS):
        training = Training(tmp_path / "run", *given, "--resume", "auto", "--max_steps", str(last), ranks=1)
        assert training.end(limit=300) == [0], training.output
    assert "goes on after step 1" in training.output
    expected, model = plain_losses(given)
    assert [loss for _, loss in losses(tmp_path / "run")] == pytest.approx(expected, rel=1e-5)
    assert_trained(source, tmp_path / "run" / "model", model)


@pytest.mark.parametrize("name", ["gemma3", "mistral3"])
def test_a_plan_is_of_the_language_model(name: str, tmp_path: Path) -> None:
    """Of a config alone, too, where all starts from random weights."""
    source = tmp_path / "source"
    CONFIGS[name]().save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    run = prepare(parse_train_config(flags(tmp_path, source, 3)), Launch.from_environment({}))
    assert run.weights is None
    assert run.whole is not None
    assert run.model_config.model_type == run.whole.config.get_text_config().model_type
    shape = run.request.work.shape
    whole = sum(tensor.numel() for tensor in run.whole.rest(torch.float32).values())
    assert shape.trained.all == shape.parameter_count
    assert shape.parameter_count + whole == AutoModelForImageTextToText.from_config(CONFIGS[name]()).num_parameters()


def test_a_whole_model_that_differs_on_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a run, and by mst-preflight."""
    source = multimodal_folder(tmp_path / "source", "mistral3")
    given = flags(tmp_path, source, 3)
    own = Mistral3Model.forward
    monkeypatch.setattr(
        Mistral3Model, "forward", lambda self, input_ids=None, **kwargs: own(self, input_ids.flip(1), **kwargs)
    )
    with pytest.raises(ValueError, match="preflight: Mistral3ForConditionalGeneration computes on text other than"):
        prepare(parse_train_config(given), Launch.from_environment({}))
    capsys.readouterr()
    assert preflight(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Mistral3ForConditionalGeneration computes on text other than" in line


def test_a_plan_on_the_whole_model_is_refused() -> None:
    model = multimodal_model("gemma3")
    with pytest.raises(ValueError, match="Gemma3ForConditionalGeneration is multimodal; allowed: its language model"):
        apply_settings(model, Settings())


def test_added_tokens_are_rows_of_the_whole(tmp_path: Path) -> None:
    source = multimodal_folder(tmp_path / "source", "gemma3")
    more = [f"word{index}" for index in range(10)]
    given = flags(tmp_path, source, 3, "--preflight", "false", "--add_tokens", *more)
    run = prepare(parse_train_config(given), Launch.from_environment({}))
    assert run.whole is not None
    assert run.whole.config.get_text_config().vocab_size == run.model_config.vocab_size == 257 + 10
    assert run.stored_vocab_size == 264

"""The training command on preferences: as TRL's trainer has them, on shards, with a reference that is kept."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from small_trainings import model, samples, tokenizer
from trainings import Training, losses

trl = pytest.importorskip("trl", reason="TRL is not there for Python 3.10")

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
# Both have every pair in a step: 594 tokens go into one sample of 1024.
OURS = ("--max_steps", "4", "--seq_len", "512", "--preflight", "false", "--save_steps", "2")
OURS += ("--lr_scheduler_type", "constant", "--warmup_steps", "0", "--weight_decay", "0", "--adam_beta2", "0.999")


def of_trl(trained: Any, kind: str = "preference", **settings: Any) -> list[dict[str, float]]:
    """What TRL logs of each step, with the same optimizer."""
    trainers = {"preference": (trl.DPOConfig, trl.DPOTrainer), "labelled": (trl.KTOConfig, trl.KTOTrainer)}
    make_arguments, make_trainer = trainers[kind]
    arguments = make_arguments(
        output_dir=tempfile.mkdtemp(),
        max_steps=4,
        per_device_train_batch_size=12,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        **settings,
    )
    reader = tokenizer()
    # TRL writes EOS as text.
    reader.split_special_tokens = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(
            model=trained,
            # Of adapters TRL keeps a copy, as they are at first.
            ref_model=None if isinstance(trained, PeftModel) else model(),
            args=arguments,
            train_dataset=rows(kind),
            processing_class=reader,
        )
        trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def rows(kind: str) -> Dataset:
    """Pairs, or answers with labels, most of them desirable: the model comes to like any answer better."""
    if kind == "preference":
        return samples("preference")
    labelled = [
        {"prompt": row["prompt"], "completion": row[name], "label": name == "rejected"}
        for number, row in enumerate(samples("preference"))
        for name in (("chosen", "rejected") if number % 3 == 0 else ("rejected",))
    ]
    return Dataset.from_list(labelled[:12])


def data(folder: Path, kind: str = "preference") -> list[str]:
    """The flags of the model, its tokenizer and the rows that TRL's trainer gets."""
    model().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    rows(kind).to_json(folder / "rows.jsonl")
    return ["--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), *OURS]


def run(output_dir: Path, *flags: str) -> list[dict[str, float]]:
    training = Training(output_dir, *flags)
    assert training.end(limit=300) == [0, 0], training.output
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def assert_same(ours: list[dict[str, float]], theirs: list[dict[str, float]], names: Collection[str] = METRICS) -> None:
    assert len(ours) == len(theirs) == 4
    for own, other in zip(ours, theirs, strict=True):
        expected = {name: other[name] for name in names}
        assert {name: own[name] for name in names} == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert theirs[-1]["loss"] < theirs[0]["loss"]


@pytest.mark.slow
def test_dpo_on_shards_is_trl_s_and_goes_on_with_its_reference(tmp_path: Path) -> None:
    """Under ZeRO-3, a sequence on both ranks; in another folder the reference is computed again, of the first model."""
    flags = [*data(tmp_path), "--objective", "dpo", "--learning_rate", "1e-2"]
    ours = run(tmp_path / "whole", *flags)
    assert_same(ours, of_trl(model(), learning_rate=1e-2))

    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000002"
    run(tmp_path / "parts", *flags, "--resume", str(checkpoint))
    assert losses(tmp_path / "parts") == [each for each in losses(tmp_path / "whole") if each[0] > 2]
    kept = [load_file(tmp_path / name / "reference.safetensors")["logps"] for name in ("whole", "parts")]
    assert kept[0].isfinite().sum() == 24
    assert kept[0].equal(kept[1])


@pytest.mark.slow
def test_ipo_with_a_trained_adapter_is_trl_s(tmp_path: Path) -> None:
    """The reference is what the run starts from, the adapter with it."""
    adapted = get_peft_model(model(), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(tmp_path / "adapter")
    flags = [*data(tmp_path), "--objective", "ipo", "--beta", "0.2", "--learning_rate", "1e-2"]
    ours = run(tmp_path / "run", *flags, "--adapter", str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(model(), str(tmp_path / "adapter"), is_trainable=True)
    assert_same(ours, of_trl(loaded, learning_rate=1e-2, beta=0.2, loss_type=["ipo"]))
    assert (tmp_path / "run" / "model" / "adapter_config.json").exists()


@pytest.mark.slow
def test_kto_on_shards_is_trl_s(tmp_path: Path) -> None:
    flags = [*data(tmp_path, "labelled"), "--objective", "kto", "--learning_rate", "1e-2"]
    flags += ["--desirable_weight", "1.5"]
    ours = run(tmp_path / "run", *flags)
    theirs = of_trl(model(), "labelled", learning_rate=1e-2, desirable_weight=1.5)
    assert_same(ours, theirs, ("loss", "kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"))
    assert max(record["kl"] for record in ours) > 0

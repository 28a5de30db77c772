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
from torch.nn.utils.rnn import pad_sequence
from trainings import Training, losses

trl = pytest.importorskip("trl", reason="TRL is not there for Python 3.10")
cpo = pytest.importorskip("trl.experimental.cpo")

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
# Both have every pair in a step: 594 tokens go into one sample of 1024.
OURS = ("--max_steps", "4", "--seq_len", "512", "--preflight", "false", "--save_steps", "2")
OURS += ("--lr_scheduler_type", "constant", "--warmup_steps", "0", "--weight_decay", "0", "--adam_beta2", "0.999")


class GivenAnswers(trl.GRPOTrainer):
    """Trains on answers that were sampled before, as they are in `rollouts`."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, torch.Tensor]:
        made = rollouts()
        prompts = [row["input_ids"][: -len(row["old_logps"])] for row in made]
        answers = [row["input_ids"][-len(row["old_logps"]) :] for row in made]
        return {
            "prompt_ids": padded(prompts, side="left"),
            "prompt_mask": padded([[1] * len(ids) for ids in prompts], side="left"),
            "completion_ids": padded(answers),
            "completion_mask": padded([[1] * len(ids) for ids in answers]),
            "advantages": torch.tensor([row["advantages"] for row in made]),
            "old_per_token_logps": padded([row["old_logps"] for row in made]),
            "num_items_in_batch": torch.tensor(sum(map(len, answers))),
        }


def padded(values: list[list[Any]], side: str = "right") -> torch.Tensor:
    return pad_sequence([torch.tensor(each) for each in values], batch_first=True, padding_side=side)


TRL = {
    "preference": (trl.DPOConfig, trl.DPOTrainer),
    "labelled": (trl.KTOConfig, trl.KTOTrainer),
    "pairs": (cpo.CPOConfig, cpo.CPOTrainer),
    "rollout": (trl.GRPOConfig, GivenAnswers),
}


def of_trl(trained: Any, kind: str = "preference", **settings: Any) -> list[dict[str, float]]:
    """What TRL logs of each step, with the same optimizer."""
    make_arguments, make_trainer = TRL[kind]
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
    of_trainer: dict[str, Any] = {}
    if kind in ("preference", "labelled"):
        # Of adapters TRL keeps a copy, as they are at first.
        of_trainer["ref_model"] = None if isinstance(trained, PeftModel) else model()
    elif kind == "pairs":
        # Which CPOTrainer alone writes before the prompt.
        reader.bos_token = None
    else:
        of_trainer["reward_funcs"] = lambda **_: []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(
            model=trained,
            args=arguments,
            train_dataset=rows(kind),
            processing_class=reader,
            **of_trainer,
        )
        trainer.train()
    return [record for record in trainer.state.log_history if "loss" in record]


def rollouts() -> list[dict[str, Any]]:
    """Answers with how much better they are than others, and what the model that sampled them thought of each token:
    near enough to what the trained one does that some tokens are clipped, and some are not."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for number, row in enumerate(samples("preference")):
        prompt, answer = tokenizer()(row["prompt"]).input_ids, tokenizer()(row["chosen"]).input_ids
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            log_probs = model()(ids).logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
        old = log_probs.gather(1, ids[0, len(prompt) :, None])[:, 0] + 0.2 * torch.randn(len(answer), generator=draw)
        labels = [-100] * len(prompt) + answer
        advantages = (-1) ** number * (0.5 + number / 12)
        made.append(
            {"input_ids": prompt + answer, "labels": labels, "advantages": advantages, "old_logps": old.tolist()}
        )
    return made


def rows(kind: str) -> Dataset:
    """Pairs, or answers with labels, most of them desirable: the model comes to like any answer better; or what a
    trainer is given that is to sample."""
    if kind == "rollout":
        return samples("preference").select_columns("prompt")
    if kind in ("preference", "pairs"):
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
    given = Dataset.from_list(rollouts()) if kind == "rollout" else rows(kind)
    given.to_json(folder / "rows.jsonl")
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


@pytest.mark.slow
def test_simpo_on_shards_is_trl_s(tmp_path: Path) -> None:
    flags = [*data(tmp_path), "--objective", "simpo", "--learning_rate", "1e-2", "--gamma_beta_ratio", "0.4"]
    theirs = of_trl(
        model(), "pairs", learning_rate=1e-2, loss_type="simpo", cpo_alpha=0, beta=2, simpo_gamma=0.8, max_length=512
    )
    assert_same(run(tmp_path / "run", *flags), theirs)


@pytest.mark.slow
def test_the_policy_s_loss_on_shards_is_that_of_trl(tmp_path: Path) -> None:
    """Of DAPO, with answers of which some tokens are clipped."""
    flags = [*data(tmp_path, "rollout"), "--objective", "policy", "--learning_rate", "1e-3", "--epsilon_high", "0.3"]
    settings = {"num_generations": 2, "generation_batch_size": 12, "epsilon_high": 0.3, "loss_type": "dapo"}
    theirs = of_trl(model(), "rollout", learning_rate=1e-3, beta=0, **settings)
    clipped = [f"clip_ratio/{each}_mean" for each in ("low", "high", "region")]
    assert_same(run(tmp_path / "run", *flags), theirs, ("loss", "grad_norm", *clipped))
    assert 0 < theirs[0]["clip_ratio/low_mean"] < 1
    assert 0 < theirs[0]["clip_ratio/high_mean"] < 1

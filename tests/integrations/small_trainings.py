"""Short trainings by transformers' Trainer and TRL's, with and without a plan, on made-up data."""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny import tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mst_ds.data import byte_tokenizer
from mst_ds.integrations import MstTrainerMixin
from mst_ds.settings import Settings

pytest.importorskip("trl", reason="TRL is not there for Python 3.10")
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

# Chunks of uneven lengths, and more than one of a layer.
SETTINGS = Settings(layer_chunks=2, mlp_chunks=3, loss_chunks=3, recompute=True)
SHARDED = Settings(sp_size=2, layer_chunks=2, mlp_chunks=3, loss_chunks=3, recompute=True)
ZERO_3: Mapping[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    # No parameter is whole on every rank.
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
MAX_LENGTH = 64
_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}#{% endif %}{% endfor %}"
)


class MstTrainer(MstTrainerMixin, Trainer):
    pass


class MstSFTTrainer(MstTrainerMixin, SFTTrainer):
    pass


class MstDPOTrainer(MstTrainerMixin, DPOTrainer):
    pass


class MstKTOTrainer(MstTrainerMixin, KTOTrainer):
    pass


# By name: the trainer without a plan, that with one, and the class of their arguments.
TRAINERS: Mapping[str, tuple[type[Trainer], type[Trainer], type[TrainingArguments]]] = {
    "trainer": (Trainer, MstTrainer, TrainingArguments),
    "sft": (SFTTrainer, MstSFTTrainer, SFTConfig),
    "dpo": (DPOTrainer, MstDPOTrainer, DPOConfig),
    "kto": (KTOTrainer, MstKTOTrainer, KTOConfig),
}
# What each logs of its steps and evaluations, where it does.
_NAMES = (
    "loss",
    "eval_loss",
    "grad_norm",
    "mean_token_accuracy",
    "num_tokens",
    "entropy",
    "kl",
    "eval_rewards/margins",
)
_NAMES += tuple(f"{kind}/{answer}" for kind in ("rewards", "logps", "logits") for answer in ("chosen", "rejected"))


def model(seed: int = 0) -> PreTrainedModel:
    made = tiny_llama(vocab_size=257)
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(seed * torch.randn_like(weight), alpha=0.02)
    return made


def tokenizer() -> PreTrainedTokenizerFast:
    made = byte_tokenizer()
    made.chat_template = _TEMPLATE
    return made


def samples(kind: str) -> Dataset:
    """12 samples of different lengths: rows of "tokens", "text", "completion", "chat", "preference" or
    "labelled"."""
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices("abcdefgh ", k=length))

    def row(number: int) -> dict[str, Any]:
        if kind == "tokens":
            ids = [draw.randrange(256) for _ in range(20 + 3 * number)]
            return {"input_ids": ids, "labels": [-100] * (1 + number) + ids[1 + number :]}
        if kind == "text":
            return {"text": text(10 + 3 * number)}
        if kind == "completion":
            return {"prompt": text(5 + number), "completion": text(6 + 2 * number)}
        if kind == "preference":
            return {"prompt": text(5 + number), "chosen": text(6 + number), "rejected": text(4 + 2 * number)}
        if kind == "labelled":
            return {"prompt": text(5 + number), "completion": text(6 + number), "label": number % 3 > 0}
        turns = [("user", 4 + number), ("assistant", 5 + number), ("user", 3), ("assistant", 6)]
        return {"messages": [{"role": role, "content": text(length)} for role, length in turns]}

    return Dataset.from_list([row(number) for number in range(12)])


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Padded on the right."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], value: int) -> torch.Tensor:
        return torch.tensor([each + [value] * (longest - len(each)) for each in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], 0),
        "labels": padded([row["labels"] for row in rows], -100),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }


def arguments(kind: str, **changed: Any) -> TrainingArguments:
    # Of an earlier trainer in this process that had DeepSpeed.
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,  # which TRL has on
    }
    if kind != "trainer":
        settings["max_length"] = MAX_LENGTH
    return TRAINERS[kind][2](**{**settings, **changed})


def make_trainer(kind: str, data: str, *, given: Mapping[str, Any] | None = None, **changed: Any) -> Any:
    """A trainer; the last of the 5 samples of its evaluation is a batch by itself.

    Args:
        given: what a trainer with a plan is given beside what others are; None: one without a plan.
        changed: arguments of the training, and what the trainer gets: `trainer_arguments`.
    """
    rows = samples(data)
    of_trainer = {"model": model(), "train_dataset": rows, "eval_dataset": rows.select(range(5))}
    of_trainer |= changed.pop("trainer_arguments", {})
    plain, planned, _ = TRAINERS[kind]
    if kind == "trainer":
        of_trainer = {"data_collator": collate, **of_trainer}
    else:
        of_trainer = {"processing_class": tokenizer(), **of_trainer}
    if kind in ("dpo", "kto"):
        of_trainer = {"ref_model": model(1), **of_trainer}
    trained: Callable[..., Any] = plain if given is None else planned
    return trained(args=arguments(kind, **changed), **of_trainer, **(given or {}))


def curve(kind: str, data: str, **settings: Any) -> dict[str, list[float]]:
    """What a training logs of each step and evaluation, see `make_trainer`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = make_trainer(kind, data, **settings)
        trainer.train()
    if settings.get("given") is not None:
        assert "forward" in trainer.accelerator.unwrap_model(trainer.model).get_decoder().__dict__
    return {name: [record[name] for record in trainer.state.log_history if name in record] for name in _NAMES}


def curve_of_rank(rank: int, kind: str, data: str, settings: Mapping[str, Any]) -> dict[str, list[float]]:
    try:
        return curve(kind, data, **settings)
    finally:
        # While the arguments of a trainer with ZeRO-3 live, the weights of other tests' models would be in parts.
        unset_hf_deepspeed_config()


def assert_same(actual: Mapping[str, list[float]], expected: Mapping[str, list[float]]) -> None:
    assert len(expected["loss"]) >= 4
    assert len(expected["eval_loss"]) == 2
    for name, values in expected.items():
        # A reward is the small difference of two sums.
        assert actual[name] == pytest.approx(values, rel=1e-5, abs=1e-5 if "rewards" in name or name == "kl" else None)

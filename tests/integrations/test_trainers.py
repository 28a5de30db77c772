"""Trainers with a plan train as without one: transformers' and TRL's, on one process and on two, with DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from distributed import run_ranks
from small_trainings import SETTINGS, ZERO_3, assert_same, curve, curve_of_rank, make_trainer, model, tokenizer
from transformers import LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer

from mst_ds.integrations import MstTrainerMixin

PACKED = {"packing": True, "max_length": 48}
# Each kind of batch that a trainer makes: padded, parts of rows without labels, rows of several documents, no rows.
BATCHES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "trainer": ("trainer", "tokens", {}),
    "sft": ("sft", "text", {}),
    "sft-completion": ("sft", "completion", {}),
    "sft-assistant": ("sft", "chat", {"assistant_only_loss": True}),
    "sft-packed": ("sft", "text", PACKED),
    "sft-padding-free": ("sft", "text", {"padding_free": True, "max_length": None}),
    "dpo": ("dpo", "preference", {}),
}


@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_with_settings(name: str) -> None:
    kind, data, changed = BATCHES[name]
    assert_same(curve(kind, data, given={"mst": SETTINGS}, **changed), curve(kind, data, **changed))


@pytest.mark.parametrize("kind", ["trainer", "sft", "dpo"])
def test_without_a_json_the_plan_is_made_from_the_arguments(kind: str) -> None:
    data = {"trainer": "tokens", "sft": "text", "dpo": "preference"}[kind]
    length: dict[str, Any] = {"seq_len": 64} if kind == "trainer" else {}
    trainer = make_trainer(kind, data, given={"mst": {"layer_chunks": 3, "recompute": True}, **length})
    plan = trainer.mst_plan
    assert (plan.seq_len, plan.zero_stage, plan.dtype, plan.gradient_accumulation_steps) == (64, 0, "fp32", 2)
    # Of a pair of answers both are in the batch.
    assert plan.micro_batch_size == (4 if kind == "dpo" else 2)
    assert trainer.mst_settings == plan.settings
    assert (plan.settings.layer_chunks, plan.settings.recompute) == (3, True)
    if kind == "dpo":
        assert "forward" in trainer.ref_model.get_decoder().__dict__


def test_a_plan_that_does_not_fit_is_said_to() -> None:
    with pytest.warns(UserWarning, match=r"the plan does not fit: .* of 0\.0 GiB in the .*; mst-plan says what"):
        make_trainer("trainer", "tokens", given={"mst": {"device_memory_gib": 0.001}, "seq_len": 64})


def test_a_reference_model_that_trl_loads_has_the_plan(tmp_path) -> None:
    """And before it the attention that the policy had."""
    model().save_pretrained(tmp_path)

    def loaded() -> dict[str, Any]:
        return {"trainer_arguments": {"model": LlamaForCausalLM.from_pretrained(tmp_path), "ref_model": None}}

    expected = curve("dpo", "preference", **loaded())
    trainer = make_trainer("dpo", "preference", given={"mst": SETTINGS}, **loaded())
    assert "forward" in trainer.ref_model.get_decoder().__dict__
    assert trainer.args.model_init_kwargs == {"attn_implementation": "sdpa"}
    assert_same(curve("dpo", "preference", given={"mst": SETTINGS}, **loaded()), expected)


def test_each_model_of_model_init_gets_the_plan() -> None:
    made: list[Any] = []

    def init() -> Any:
        made.append(model())
        return made[-1]

    own = {"model": None, "model_init": init}
    found = curve("trainer", "tokens", given={"mst": SETTINGS}, trainer_arguments=own)
    assert len(made) == 2
    assert all("forward" in each.model.__dict__ for each in made)
    assert_same(found, curve("trainer", "tokens", trainer_arguments={"model": None, "model_init": init}))


def test_a_saved_model_is_one_without_a_plan(tmp_path) -> None:
    trainer = make_trainer("trainer", "tokens", given={"mst": SETTINGS})
    trainer.save_model(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert all(torch.equal(weight, model().get_parameter(name)) for name, weight in loaded.named_parameters())


@pytest.mark.parametrize("kind", ["trainer", "sft"])
def test_metrics_of_reduced_logits(kind: str) -> None:
    data = {"trainer": "tokens", "sft": "text"}[kind]
    seen: list[Any] = []

    def count(found: Any) -> dict[str, float]:
        seen.append(found.predictions * (found.label_ids != -100))  # what stands on padding means nothing
        return {"right": float((found.predictions[:, :-1] == found.label_ids[:, 1:]).mean())}

    def reduce(logits: Any, labels: Any) -> Any:
        return logits.argmax(dim=-1)

    own = {"compute_metrics": count, "preprocess_logits_for_metrics": reduce}
    expected = curve(kind, data, trainer_arguments=own)
    assert_same(curve(kind, data, trainer_arguments=own, given={"mst": SETTINGS}), expected)
    half = len(seen) // 2
    assert half > 0
    assert all((mine == theirs).all() for mine, theirs in zip(seen[half:], seen[:half], strict=True))


def test_a_trainer_that_makes_batches_of_lists_of_samples(tmp_path: Path) -> None:
    """GRPOTrainer samples completions, and trains on them, with the patched model."""

    class Planned(MstTrainerMixin, GRPOTrainer):
        pass

    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        num_generations=2,
        max_completion_length=4,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        logging_steps=1,
    )
    trainer = Planned(
        model=model(0),
        reward_funcs=lambda completions, **_: [float(number) for number in range(len(completions))],
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": "one"}, {"prompt": "two"}]),
        processing_class=tokenizer(),
        mst=SETTINGS,
    )
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer", "sft", "dpo"])
def test_zero_3_on_two_ranks(name: str) -> None:
    """The plan is that of the JSON, whose "mst" block neither accelerate nor DeepSpeed may see."""
    kind, data, _ = BATCHES[name]
    block = {"layer_chunks": 2, "recompute": True, "mlp_chunks": "auto", "loss_chunks": "auto"}
    expected = run_ranks(curve_of_rank, 2, kind, data, {"deepspeed": dict(ZERO_3)})
    length = {"seq_len": 64} if kind == "trainer" else {}
    given = {"given": length, "deepspeed": {**ZERO_3, "mst": block}}
    for actual, of_rank in zip(run_ranks(curve_of_rank, 2, kind, data, given), expected, strict=True):
        assert_same(actual, of_rank)

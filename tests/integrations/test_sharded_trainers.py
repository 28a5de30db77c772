"""Sequences shared by two ranks train as whole ones on one process: losses, gradients, evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from distributed import run_ranks
from peft import LoraConfig
from small_trainings import SHARDED, ZERO_3, assert_same, collate, curve, curve_of_rank, make_trainer, samples
from trl.trainer.dpo_trainer import DataCollatorForPreference

WHOLE = {"trainer": ("trainer", "tokens"), "sft": ("sft", "text"), "dpo": ("dpo", "preference")}


def assert_as_unsharded(kind: str, data: str, *, given: Mapping[str, Any], world_size: int = 2, **changed: Any) -> None:
    """On two ranks for each sequence as without a plan on one."""
    reference = {name: value for name, value in changed.items() if name != "deepspeed"}
    expected = (
        [curve(kind, data, **reference)]
        if world_size == 2
        else run_ranks(curve_of_rank, world_size // 2, kind, data, reference)
    )
    settings = {"given": dict(given), **changed}
    for actual in run_ranks(curve_of_rank, world_size, kind, data, settings):
        assert_same(actual, expected[0])


@pytest.mark.parametrize("name", [*WHOLE, "kto"])
def test_as_unsharded(name: str) -> None:
    """The samples of the evaluation do not fill its batches; labels of the last batch are on one rank more than on the
    other."""
    assert_as_unsharded(*WHOLE.get(name, ("kto", "labelled")), given={"mst": SHARDED})


def other_batches(rank: int) -> None:
    for kind, collator in (("trainer", collate), ("dpo", DataCollatorForPreference(pad_token_id=0))):

        def of_rank(rows: list[dict[str, Any]], collator: Callable[..., Any] = collator) -> Any:
            batch = collator(rows)
            batch["input_ids"][0, 3] = rank
            return batch

        given = {"given": {"mst": SHARDED}, "trainer_arguments": {"data_collator": of_rank}}
        trainer = make_trainer(*WHOLE[kind], **given)
        assert trainer.get_total_train_batch_size(trainer.args) == 2 * 2
        with pytest.raises(ValueError, match="ranks 0 to 1 share their sequences and were given different batches"):
            trainer.train()


def test_ranks_of_a_sequence_have_its_shards() -> None:
    run_ranks(other_batches, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_as_unsharded_with_zero_3(name: str) -> None:
    block = {"sp_size": 2, "layer_chunks": 2, "recompute": True}
    length = {"seq_len": 64} if name == "trainer" else {}
    steps = {"max_steps": 10, "eval_steps": 5} if name == "dpo" else {}
    assert_as_unsharded(*WHOLE[name], given=length, deepspeed={**ZERO_3, "mst": block}, **steps)


@pytest.mark.slow
def test_an_adapter_of_dpotrainer() -> None:
    """The reference is the model without it."""
    own = {"ref_model": None, "peft_config": LoraConfig(r=4, target_modules=["q_proj"])}
    assert_as_unsharded("dpo", "preference", given={"mst": SHARDED}, trainer_arguments=own)


def on_disk(folder: Path) -> dict[str, Any]:
    """Preferences in a file, beside which TRL keeps what it has precomputed."""
    samples("preference").save_to_disk(folder)
    rows = load_from_disk(folder)
    return {"train_dataset": rows, "eval_dataset": rows.select(range(5)), "ref_model": None}


@pytest.mark.slow
def test_a_precomputed_reference_of_dpotrainer(tmp_path: Path) -> None:
    """What stands behind the end of the shorter answer weighs less: where a token stands counts."""
    settings = {"precompute_ref_log_probs": True, "ld_alpha": 0.5}
    whole, sharded = ({"trainer_arguments": on_disk(tmp_path / name), **settings} for name in ("whole", "sharded"))
    expected = curve("dpo", "preference", **whole)
    for actual in run_ranks(curve_of_rank, 2, "dpo", "preference", {"given": {"mst": SHARDED}, **sharded}):
        assert_same(actual, expected)


SFT: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("completion", {}),
    "assistant": ("chat", {"assistant_only_loss": True}),
    "packed": ("text", {"packing": True, "max_length": 48}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SFT)
def test_batches_of_sfttrainer(name: str) -> None:
    data, changed = SFT[name]
    assert_as_unsharded("sft", data, given={"mst": SHARDED}, **changed)


def by_length(rank: int) -> float:
    trainer = make_trainer(
        "trainer", "tokens", given={"mst": SHARDED}, train_sampling_strategy="group_by_length", max_steps=2
    )
    torch.rand(rank)  # as dropout does, of which ranks may have different
    return trainer.train().training_loss


def test_ranks_of_a_sequence_draw_the_same_order() -> None:
    first, second = run_ranks(by_length, 2)
    assert first == second


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_two_sequences_at_a_time(name: str) -> None:
    """Five samples are dealt in batches of two to two sequences: three are repeated, and do not count."""
    assert_as_unsharded(*WHOLE[name], given={"mst": SHARDED}, world_size=4)

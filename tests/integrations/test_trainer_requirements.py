"""What goes past a plan, or would be computed of a shard as if it were the sequence, is refused in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import ParallelismConfig
from small_trainings import SETTINGS, SHARDED, make_trainer, model
from torch import nn
from transformers import Trainer
from trl import RewardTrainer
from trl.experimental.gkd import GKDTrainer

from mst_ds import apply_settings
from mst_ds.integrations.requirements import require_plannable, require_shardable_training
from mst_ds.integrations.sharded import shard_of_batch
from mst_ds.topology import Topology


def plannable(**changed: Any) -> Any:
    """What is asked of a trainer, which sees nothing that a plan does not know, with changes."""
    args = {"use_liger_kernel": False, "torch_compile": False, "fsdp": [], "n_gpu": 0}
    accelerator = SimpleNamespace(parallelism_config=changed.pop("parallelism_config", None))
    return SimpleNamespace(args=SimpleNamespace(**{**args, **changed}), accelerator=accelerator, is_fsdp_enabled=False)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel is set"),
        ({"torch_compile": True}, "torch_compile is set"),
        ({"fsdp": ["full_shard"]}, "fsdp is set"),
        ({"n_gpu": 2}, "one process sees 2 GPUs"),
        ({"parallelism_config": ParallelismConfig(cp_size=2)}, "has cp_size 2"),
        ({"parallelism_config": ParallelismConfig(sp_size=2, sp_backend="deepspeed")}, "has sp_size 2"),
        ({"parallelism_config": ParallelismConfig(tp_size=2)}, "has tp_size 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_goes_past_a_plan(changed: dict[str, Any], words: str) -> None:
    require_plannable(plannable(parallelism_config=ParallelismConfig(dp_replicate_size=2)))
    with pytest.raises(ValueError, match=f"{words}.*; allowed: ") as refused:
        require_plannable(plannable(**changed))
    assert "\n" not in str(refused.value)


def test_a_trainer_asks() -> None:
    with pytest.raises(ValueError, match=r"torch_compile is set"):
        make_trainer("trainer", "tokens", given={"mst": SETTINGS}, torch_compile=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"average_tokens_across_devices": False}, "average_tokens_across_devices"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy is 'batch_rebalance'"),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches"),
        ({"trainer_arguments": {"compute_loss_func": lambda *_: None}}, "compute_loss_func"),
        ({"trainer_arguments": {"compute_metrics": lambda _: {}}}, "compute_metrics"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_of_shards(changed: dict[str, Any], words: str) -> None:
    require_shardable_training(make_trainer("trainer", "tokens"), 2)
    with pytest.raises(ValueError, match=f"{words}.* with sp_size 2; allowed: .*, or sp_size 1") as refused:
        require_shardable_training(make_trainer("trainer", "tokens", **changed), 2)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("made", [RewardTrainer, GKDTrainer])
def test_trainers_of_trl_that_are_not_of_shards(made: type[Trainer]) -> None:
    """Also one that is made of SFTTrainer, and samples answers."""
    trainer = make_trainer("sft", "text")
    trainer.__class__ = made
    with pytest.raises(ValueError, match=f"{made.__name__} does more .* with sp_size 2; allowed: .*, SFTTrainer, DPO"):
        require_shardable_training(trainer, 2)


def test_a_router_loss_of_sfttrainer_is_not_of_shards() -> None:
    trainer = make_trainer("sft", "text")
    require_shardable_training(trainer, 2)
    trainer.aux_loss_enabled = True
    with pytest.raises(ValueError, match="router_aux_loss_coef is set"):
        require_shardable_training(trainer, 2)


def wrapped_forward() -> Any:
    """As accelerate's autocast does it."""
    made = model()
    made.forward = made.forward
    return made


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: apply_settings(model(), SETTINGS), "the model has a plan already"),
        (wrapped_forward, "the forward of LlamaForCausalLM was replaced on this instance"),
        (lambda: nn.DataParallel(model()), "DataParallel is neither"),
    ],
    ids=["planned", "forward", "module"],
)
def test_a_model_that_has_a_plan_or_is_wrapped(made: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_trainer("trainer", "tokens", given={"mst": SETTINGS}, trainer_arguments={"model": made()})


def test_logits_of_a_whole_evaluation() -> None:
    given = {"given": {"mst": SETTINGS}, "trainer_arguments": {"compute_metrics": lambda _: {}}}
    with pytest.raises(ValueError, match="compute_metrics is set without preprocess_logits_for_metrics"):
        make_trainer("trainer", "tokens", **given)


def test_a_plan_needs_a_length_and_one_source() -> None:
    with pytest.raises(ValueError, match=r"length of the longest sequence; allowed: seq_len=\.\.\. for the trainer"):
        make_trainer("trainer", "tokens", given={})
    block = {"zero_optimization": {"stage": 0}, "mst": {"mlp_chunks": 2}}
    with pytest.raises(ValueError, match="has an 'mst' block, and the trainer was given mst as well"):
        make_trainer("trainer", "tokens", given={"mst": SETTINGS}, deepspeed=block)


def test_sharding_needs_several_processes() -> None:
    with pytest.raises(ValueError, match="sp_size"):
        make_trainer("trainer", "tokens", given={"mst": SHARDED})


def batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(10).view(1, 10)
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"token_type_ids": torch.zeros(1, 10)}, "has token_type_ids, which sequence parallelism does not shard"),
        ({"labels": None}, "has no labels"),
        ({"cu_seq_lens_q": torch.tensor([0, 4, 10])}, "are told apart by position_ids"),
    ],
)
def test_batches_that_cannot_be_sharded(changed: dict[str, Any], words: str) -> None:
    topology = Topology(rank=1, world_size=2, sp_size=2)
    assert shard_of_batch(batch(), topology, 1)["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    with pytest.raises(ValueError, match=words):
        shard_of_batch({**batch(), **changed}, topology, 1)

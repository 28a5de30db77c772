"""Adapters of peft under a plan: loss and every gradient are those of the peft model without one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from adapted import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    HEAD,
    MLP,
    Adapter,
    adapted,
    base_model,
    lora,
    randomise,
)
from distributed import run_ranks
from error_budget import relative_errors
from peft import PeftModel, get_peft_model
from plain_model import assert_close, loss_and_gradients, make_batch
from sharded import sharded_loss_and_gradients
from steps import build_engine, patched_step, train, zero_block
from tiers import slow_but_for
from tiny import Outcome, plain_training, samples, tiny_llama, tiny_settings
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mst_ds import apply_settings, remove_plan
from mst_ds.data import IGNORE_INDEX, shard
from mst_ds.sequence_parallel import ProcessSequenceGroup
from mst_ds.topology import Topology

ADAPTERS: dict[str, tuple[str, Adapter]] = {
    "attention": ("llama", {"target_modules": ATTENTION}),
    "mlp": ("llama", {"target_modules": MLP}),
    "down": ("llama", {"target_modules": ["down_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "head": ("llama", {"target_modules": HEAD}),
    "embeddings": ("llama", {"target_modules": EMBEDDINGS}),
    "everything": ("llama", {"target_modules": [*ATTENTION, *MLP, *HEAD, *EMBEDDINGS]}),
    "saved-head": ("llama", {"target_modules": ATTENTION, "modules_to_save": HEAD}),
    "saved-head-and-embeddings": ("llama", {"target_modules": MLP, "modules_to_save": [*EMBEDDINGS, *HEAD]}),
    "saved-mlp": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["mlp"]}),
    "trained-tokens": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": [5, 6, 7]}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", {"target_modules": [*ATTENTION, *MLP, *HEAD], "use_dora": True}),
    "biases": ("llama-bias-tied", {"target_modules": [*ATTENTION, *MLP], "bias": "all"}),
    "lora-bias": ("llama", {"target_modules": [*MLP, *HEAD], "lora_bias": True}),
    "tied-head": ("llama-bias-tied", {"target_modules": [*MLP, *HEAD]}),
    "tied-embeddings": ("llama-bias-tied", {"target_modules": EMBEDDINGS}),
    "tied-both": ("llama-bias-tied", {"target_modules": [*MLP, *HEAD], "ensure_weight_tying": True}),
    "tied-saved": (
        "llama-bias-tied",
        {"target_modules": ATTENTION, "modules_to_save": EMBEDDINGS, "ensure_weight_tying": True},
    ),
    "fused-gate": ("phi3", {"target_modules": "all-linear"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "moe-attention": ("qwen3-moe", {"target_modules": ATTENTION}),
    "moe-router": ("qwen3-moe", {"target_modules": ["gate"]}),
    "moe-saved-router": ("qwen3-moe", {"target_modules": ATTENTION, "modules_to_save": ["gate"]}),
    "moe-saved-experts": ("qwen3-moe", {"target_modules": ATTENTION, "modules_to_save": ["experts"]}),
    "moe-experts": ("qwen3-moe", {"target_modules": ["gate"], "target_parameters": EXPERTS}),
    "moe-everything": ("mixtral", {"target_modules": "all-linear", "target_parameters": EXPERTS}),
}
# peft adds to a weight within a context that is one for all threads, and ties adapters in a way that has no deep copy.
NEEDS_PROCESSES = [
    name for name, (_, adapter) in ADAPTERS.items() if "target_parameters" in adapter or name == "tied-both"
]


@functools.cache
def plain_step(name: str) -> dict[str, Tensor]:
    model = adapted(*ADAPTERS[name])
    result = loss_and_gradients(model, **make_batch(30))
    trained = {parameter_name for parameter_name, parameter in model.named_parameters() if parameter.requires_grad}
    assert result.keys() == {"loss", *trained}
    return result


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trains_as_without_a_plan(name: str) -> None:
    model = adapted(*ADAPTERS[name])
    assert apply_settings(model, tiny_settings(recompute=False)) is model
    assert_close(loss_and_gradients(model, **make_batch(30)), plain_step(name))
    remove_plan(model)
    removed = loss_and_gradients(model, **make_batch(30))
    assert all(torch.equal(removed[key], value) for key, value in plain_step(name).items())


@pytest.mark.parametrize("name", ["everything", "saved-head-and-embeddings", "moe-everything"])
def test_an_adapter_trains_with_recompute_as_without_a_plan(name: str) -> None:
    model = apply_settings(adapted(*ADAPTERS[name]), tiny_settings(recompute=True))
    assert_close(loss_and_gradients(model, **make_batch(30)), plain_step(name))


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in NEEDS_PROCESSES])
def test_an_adapter_trains_on_shards_as_without(name: str) -> None:
    sharded = sharded_loss_and_gradients(adapted(*ADAPTERS[name]), make_batch(30), recompute=True)
    assert_close(sharded, plain_step(name))


def step_in_processes(rank: int, names: list[str]) -> list[dict[str, Tensor]]:
    topology, batch = Topology(rank, 2, 2), make_batch(30)
    num_items = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    results = []
    for name in names:
        model = adapted(*ADAPTERS[name])
        settings = tiny_settings(topology.sp_size, recompute=True, mlp_chunks=2 + rank)
        apply_settings(model, settings, sequence_group=ProcessSequenceGroup(dist.group.WORLD))
        step = loss_and_gradients(model, **shard(batch, topology), num_items_in_batch=num_items)
        for tensor in step.values():
            dist.all_reduce(tensor)
        results.append(step)
    return results


def test_an_adapter_trains_on_shards_in_processes_as_without() -> None:
    results, _ = run_ranks(step_in_processes, 2, NEEDS_PROCESSES)
    for name, result in zip(NEEDS_PROCESSES, results, strict=True):
        assert_close(result, plain_step(name))


def test_a_trained_head_on_a_frozen_body_without_peft() -> None:
    model = base_model("llama").requires_grad_(False)
    model.lm_head.requires_grad_(True)
    plain = loss_and_gradients(model, **make_batch(30))
    assert plain.keys() == {"loss", "lm_head.weight"}
    assert_close(patched_step(model, make_batch(30)), plain)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=ATTENTION),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
    ],
    ids=["ia3", "loha", "layer-norms"],
)
def test_adapters_of_other_kinds(config: peft.PeftConfig) -> None:
    model = get_peft_model(base_model("llama"), config)
    randomise(model)
    assert_close(patched_step(model, make_batch(30)), loss_and_gradients(model, **make_batch(30)))


# Dropout


class Masks(nn.Module):
    """Dropout that keeps the masks it draws, in `drawn`, or applies those that are given."""

    def __init__(self, given: list[Tensor] | None = None) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        if self.given is not None:
            return x * self.given.pop(0).view_as(x)
        self.drawn.append(torch.nn.functional.dropout(torch.ones_like(x), 0.5))
        return x * self.drawn[-1]


DROPOUT = {"target_modules": [*MLP, *HEAD], "lora_dropout": 0.5}


def dropouts(model: PeftModel) -> dict[str, Any]:
    """The dropout holders of all adapted layers."""
    return {name: layer.lora_dropout for name, layer in model.named_modules() if hasattr(layer, "lora_dropout")}


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_every_chunk_draws_masks_of_its_own_and_recompute_the_same(recompute: bool) -> None:
    model = adapted("llama", DROPOUT)
    apply_settings(model, tiny_settings(recompute=recompute))
    if recompute:
        loss_and_gradients(model, **make_batch(30))  # the first backward finds out what need not be computed again
    for holder in dropouts(model).values():
        holder["default"] = Masks()
    torch.manual_seed(5)
    patched = loss_and_gradients(model, **make_batch(30))

    plain = adapted("llama", DROPOUT)
    drawn = {name: holder["default"].drawn for name, holder in dropouts(model).items()}
    for name, holder in dropouts(plain).items():
        chunks = 3 if "lm_head" in name else 4  # of tiny_settings
        # The head runs once. An MLP runs in the forward and in its own backward; with recompute one token before that.
        times = 1 if "lm_head" in name else 2
        masks = list(drawn[name])
        if recompute and times == 2:
            assert masks.pop(chunks).shape[-2] == 1
        assert len(masks) == times * chunks
        forward, *again = (masks[start : start + chunks] for start in range(0, times * chunks, chunks))
        assert all(torch.equal(a, b) for other in again for a, b in zip(other, forward, strict=True))
        assert not any(torch.equal(forward[0], mask) for mask in forward[1:])
        holder["default"] = Masks(given=[torch.cat(forward, dim=-2)])
    assert_close(patched, loss_and_gradients(plain, **make_batch(30)))


def test_dropout_depends_on_the_seed_alone() -> None:
    results = []
    for recompute, seed in ((False, 5), (True, 5), (True, 6)):
        model = apply_settings(adapted("llama", DROPOUT), tiny_settings(recompute=recompute))
        torch.manual_seed(seed)
        results.append((loss_and_gradients(model, **make_batch(30)), torch.rand(1)))
    (first, next_number), (same, same_number), (other, _) = results
    assert_close(same, first)
    assert torch.equal(next_number, same_number), "recompute leaves the random generator elsewhere"
    assert min(relative_errors(other, first).values()) > 1e-3


# Under DeepSpeed. fp32 sums in another order; measured: up to 1e-6.
ENGINE_TOLERANCE = 1e-5
SEQ_LEN = 131


def fp32_moe() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)).train()


ENGINE_CASES: dict[str, tuple[Callable[[], PreTrainedModel], Adapter]] = {
    "everything": (tiny_llama, {"target_modules": [*ATTENTION, *MLP, *HEAD]}),
    # Nothing in front of the first MLP has a gradient.
    "only MLPs, with DoRA": (tiny_llama, {"target_modules": MLP, "use_dora": True}),
    "only the head": (tiny_llama, {"target_modules": HEAD}),
    "modules to save": (tiny_llama, {"target_modules": ["up_proj"], "modules_to_save": [*HEAD, *EMBEDDINGS]}),
    "only experts": (fp32_moe, {"target_modules": [], "target_parameters": EXPERTS}),
}


def fp32_adapted(case: str) -> PeftModel:
    build_model, adapter = ENGINE_CASES[case]
    torch.manual_seed(1)
    model = get_peft_model(build_model(), lora(**adapter))
    randomise(model)
    return model


def train_under_zero(rank: int, stage: int) -> dict[str, Outcome]:
    topology, outcomes = Topology(rank, 2, 2), {}
    for case in ENGINE_CASES:
        model = fp32_adapted(case)
        chunks = {"mlp_chunks": 2 + 3 * rank, "loss_chunks": 1 + 2 * rank, "layer_chunks": 4}
        settings = tiny_settings(topology.sp_size, **chunks)
        apply_settings(model, settings, zero_stage=stage)
        engine = build_engine(model, zero_optimization=zero_block(stage))
        outcomes[case] = train(engine, [shard(samples(2, SEQ_LEN), topology, layer_chunks=4)], steps=2)
        engine.destroy()
    return outcomes


@functools.cache
def plain_outcome(case: str) -> Outcome:
    return plain_training(fp32_adapted(case), samples(2, SEQ_LEN), steps=2)


@pytest.mark.parametrize("stage", slow_but_for([3], [2, 3]))
def test_adapters_train_under_zero_as_in_one_process(stage: int) -> None:
    outcomes, _ = run_ranks(train_under_zero, 2, stage)
    for case, outcome in outcomes.items():
        expected = plain_outcome(case)
        error, name = outcome.worst_gradient_error(expected)
        assert error <= ENGINE_TOLERANCE, f"{case}: gradient of {name} is off by {error:.1e}"
        assert outcome.worst_loss_error(expected) <= ENGINE_TOLERANCE, case

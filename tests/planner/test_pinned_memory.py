"""Pinned memory: blocks as torch's allocator takes them, of what DeepSpeed pins and of what layers keep."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from planned import LAYERS, MODEL, bytes_of, plan_of
from steps import build_engine
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from mst_ds.config import TrainConfig
from mst_ds.engine.optimizer import make_optimizer
from mst_ds.geometry import pinned_block
from mst_ds.memory.host import give_back_pinned_memory
from mst_ds.model_shape import ModelShape
from mst_ds.model_shape.counts import TrainedCounts
from mst_ds.planner.phases import step_phases
from mst_ds.planner.workload import Workload
from mst_ds.settings import Settings
from mst_ds.zero import read_zero
from mst_ds.zero.pinned_memory import largest_rounded_block

# "Round up the allocation to the nearest power of two to improve reuse": PowerOf2Ceil(size), in all versions of
# ATen/core/CachingHostAllocator.h from 2.9 on; an empty tensor has no block.
BLOCKS = {
    0: 0,
    1: 1,
    2: 2,
    3: 4,
    4096: 4096,
    4097: 8192,
    500_000_000: 2**29,
    2**30: 2**30,
    2**30 + 1: 2**31,
    75 * 2**30: 2**37,
}
CPU = {"device": "cpu"}
# Of plan_of's model on two ranks: the stage, zero_optimization, and the terms whose bytes DeepSpeed pins.
PINNED: dict[str, tuple[int, dict[str, Any], list[str]]] = {
    # Of some weights at a time: the embedding, two layers, the third with the head, norms.
    "stage 3, sub-groups": (3, {"offload_optimizer": CPU, "sub_group_size": 32_500}, ["gradients", "fp32_gradient"]),
    "stage 2": (
        2,
        {"offload_optimizer": CPU},
        ["master_parameters", "fp32_gradient", "parameter_staging", "gradient_staging_on_host"],
    ),
    "stage 3": (3, {"offload_optimizer": CPU}, ["gradients", "fp32_gradient"]),
    "stage 3, parameters too": (
        3,
        {"offload_optimizer": CPU, "offload_param": CPU},
        ["gradients", "fp32_gradient", "parameters", "parameter_blocks"],
    ),
    "stage 3, the optimizer not pinned": (
        3,
        {"offload_optimizer": CPU | {"pin_memory": False}, "offload_param": CPU},
        ["parameters", "parameter_blocks"],
    ),
    # One flat buffer is pinned, whatever is said.
    "stage 3, nothing pinned": (
        3,
        {key: CPU | {"pin_memory": False} for key in ("offload_optimizer", "offload_param")},
        ["parameters"],
    ),
}


@pytest.mark.parametrize(("count", "block"), BLOCKS.items())
def test_a_block_is_the_next_power_of_two(count: int, block: int) -> None:
    assert pinned_block(count) == block


MIB = 2**20
# "size <= pinned_max_round_threshold() && size <= pinned_max_cached_size()": PowerOf2Ceil(size), from torch 2.13 on.
LIMITS: dict[str, tuple[dict[str, str], int]] = {
    "all": ({}, sys.maxsize),
    "of other settings": ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, sys.maxsize),
    "to a threshold": (
        {"PYTORCH_ALLOC_CONF": "roundup_power2_divisions:[256:1,512:2],pinned_max_round_threshold_mb:32"},
        32 * MIB,
    ),
    "to what is kept": (
        {"PYTORCH_CUDA_ALLOC_CONF": "pinned_max_round_threshold_mb: 64, pinned_max_cached_size_mb: 16"},
        16 * MIB,
    ),
    "the newer name": (
        {"PYTORCH_ALLOC_CONF": "backend:native", "PYTORCH_CUDA_ALLOC_CONF": "pinned_max_round_threshold_mb:8"},
        sys.maxsize,
    ),
    "none, by DeepSpeed itself": ({"DS_PIN_MEMORY_BACKEND": "Native"}, 0),
}


@pytest.mark.parametrize("case", LIMITS)
def test_blocks_are_rounded_up_to_a_limit(case: str) -> None:
    environment, limit = LIMITS[case]
    assert largest_rounded_block(environment) == limit
    assert pinned_block(3 * MIB, limit) == (4 if limit else 3) * MIB
    assert pinned_block(33 * MIB, limit) == (64 if limit > 33 * MIB else 33) * MIB


def test_a_plan_has_the_rounding_of_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_PIN_MEMORY_BACKEND", "native")
    zero = {"offload_optimizer": CPU, "offload_param": CPU}
    for phase in plan_of(3, zero=zero, world_size=2).phases:
        assert not [term.name for term in phase.terms if term.name.endswith("_rounding")]


def pinned_sizes(rank: int, stage: int, zero: dict[str, Any], micro_batches: int = 0) -> list[int]:
    """Bytes of each tensor that DeepSpeed pins until its engine is built, or in a step of several micro-batches; on a
    CPU it would leave them as they are."""
    from deepspeed.accelerator import get_accelerator

    sizes: list[int] = []

    def pin(accelerator: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(tensor.nbytes)
        return tensor

    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": max(1, micro_batches),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
    }
    with patch.object(type(get_accelerator()), "pin_memory", pin):
        at_stage_3 = HfDeepSpeedConfig(ds_config) if stage == 3 else None
        config = LlamaConfig(**MODEL.to_dict())
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16) if at_stage_3 else LlamaForCausalLM(config)
        optimizer = make_optimizer(model, TrainConfig(), read_zero(ds_config, dp_world_size=2))
        engine = build_engine(model, optimizer=optimizer, **ds_config)
        if micro_batches:
            sizes.clear()
            ids = torch.arange(8)[None]
            for _ in range(micro_batches):
                engine.backward(engine(input_ids=ids, labels=ids).loss)
                engine.step()
        engine.destroy()
    return sizes


@pytest.mark.parametrize("case", PINNED)
def test_what_deepspeed_pins_is_planned_with_its_rounding(case: str) -> None:
    stage, zero, names = PINNED[case]
    # An optimizer without moments, which would be more than blocks that are gone by then.
    terms = bytes_of(plan_of(stage, zero=zero, world_size=2, optimizer={"type": "SGD"}), "initialisation")
    planned = sum(terms[name] + terms.get(f"{name}_rounding", 0) for name in names)
    for sizes in run_ranks(pinned_sizes, 2, stage, zero):
        assert sum(map(pinned_block, sizes)) == planned
    rounded = {name.removesuffix("_rounding") for name in terms if name.endswith("_rounding")}
    assert rounded <= set(names), "nothing else is pinned"


def test_each_weight_has_a_block_for_its_sum_of_several_micro_batches() -> None:
    """At stage 2 whole weights, though the borders of the ranks' parts cut one; as DeepSpeed allocates in a step."""
    zero = {"offload_optimizer": CPU}
    plan = plan_of(2, zero=zero, world_size=2, gradient_accumulation_steps=2)
    sizes = run_ranks(pinned_sizes, 2, 2, zero, 2)
    for phase in ("forward", "backward", "optimizer_step"):
        terms = bytes_of(plan, phase)
        assert terms["gradients"] == max(map(sum, sizes))
        assert terms["gradients"] + terms["gradients_rounding"] == max(sum(map(pinned_block, each)) for each in sizes)
    assert "gradients" not in bytes_of(plan_of(2, zero=zero, world_size=2), "backward")


def test_blocks_of_weights_are_given_back_before_activations_come() -> None:
    plan = plan_of(3, zero={"offload_param": CPU})
    assert "parameter_blocks" in bytes_of(plan, "initialisation")
    for phase in ("forward", "backward", "optimizer_step"):
        assert "parameter_blocks" not in bytes_of(plan, phase)


def test_blocks_of_weights_are_gone_when_moments_come() -> None:
    """AdamW's take 8 bytes for each parameter, blocks in 16 bits at most 4: the host never has both."""
    offloaded = {"offload_param": CPU, "offload_optimizer": CPU}
    terms = bytes_of(plan_of(3, zero=offloaded), "initialisation")
    assert "optimizer_moments" in terms
    assert "parameter_blocks" not in terms


def test_weights_below_adapters_stay_in_blocks_of_their_own() -> None:
    """By hand: shards of the MLPs' weights are 12,288 bytes, of embedding and head 64,000, of adapters 1,000 in all."""
    shape = ModelShape.from_config(MODEL)
    adapted = replace(shape, trained=TrainedCounts(all=1000, layer=300, mlp=0, head=0, embedding=0, largest=100))
    zero = read_zero(
        {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3, "offload_param": CPU}}, dp_world_size=2
    )
    settings = Settings(sp_size=1, mlp_chunks=1, loss_chunks=1, attention="sdpa")
    initialisation, *_ = step_phases(Workload(adapted, zero, seq_len=4000, settings=settings))
    terms = {term.name: term.bytes for term in initialisation.terms}
    assert terms["parameters_rounding"] == LAYERS * 3 * (2**14 - 12_288) + 2 * (2**16 - 64_000) + 24
    assert "parameter_blocks" not in terms


@pytest.mark.parametrize(
    ("module", "name"), [(torch.accelerator, "empty_host_cache"), (torch._C, "_host_emptyCache")], ids=["2.12", "2.9"]
)
def test_torch_gives_back_what_it_keeps(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
    calls: list[str] = []
    monkeypatch.delattr(torch.accelerator, "empty_host_cache", raising=False)
    monkeypatch.setattr(module, name, lambda: calls.append(name), raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    give_back_pinned_memory()
    assert calls == []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    give_back_pinned_memory()
    assert calls == [name]

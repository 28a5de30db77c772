"""The gradients of stage 2 against DeepSpeed's: of one micro-batch or several, in 16 bits and fp32, here and there."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from planned import MODEL, PARAMETERS, bytes_of, plan_of
from steps import build_engine
from transformers import LlamaConfig, LlamaForCausalLM

from mst_ds.config import TrainConfig
from mst_ds.engine.optimizer import adamw
from mst_ds.memory.live import LiveMemory
from mst_ds.zero import read_zero

ON_HOST = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "two": {"gradient_accumulation_steps": 2},
    "two, offloaded": {"gradient_accumulation_steps": 2, "zero": ON_HOST},
    "two in fp32": {"gradient_accumulation_steps": 2, **IN_FP32},
    "two in fp32, offloaded": {"gradient_accumulation_steps": 2, "zero": ON_HOST, **IN_FP32},
}


def bytes_of_backwards(rank: int) -> dict[str, int]:
    """Of tensors that a first step has made, where most are there after the backward of a micro-batch."""
    return {name: _most_bytes(**case) for name, case in CASES.items()}


def _most_bytes(*, zero: dict[str, Any] | None = None, gradient_accumulation_steps: int = 1, **more: Any) -> int:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    ds_config: dict[str, Any] = {
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, **(zero or {})},
        **more,
    }
    model = LlamaForCausalLM(LlamaConfig(**MODEL.to_dict()))
    optimizer = adamw(model, TrainConfig(), read_zero(ds_config, dp_world_size=2))
    engine = build_engine(model, optimizer=optimizer, **ds_config)
    ids, memory, found = torch.arange(8)[None], LiveMemory(), []

    def report(optimizer: Any, moment: str, elements: int) -> None:
        if moment == "In ipg_epilogue after reduce_ipg_grads":  # none is freed yet
            gc.collect()  # what a backward has left in circles
            found.append(memory.live)

    with patch.object(DeepSpeedZeroOptimizer, "report_ipg_memory_usage", report), memory:
        for _ in range(gradient_accumulation_steps):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    engine.destroy()
    return max(found)


def test_what_is_there_after_a_backward_is_planned() -> None:
    names = ("gradients", "micro_batch_gradients", "reduce_bucket")
    measured = run_ranks(bytes_of_backwards, 2)
    for name, case in CASES.items():
        terms = bytes_of(plan_of(2, world_size=2, **case), "backward")
        planned = sum(terms.get(each, 0) for each in names)
        # Loss, norms and the like.
        assert max(each[name] for each in measured) == pytest.approx(planned, abs=1000), name


def test_of_one_micro_batch_only_sums_in_fp32_are_beside_its_gradients() -> None:
    one = bytes_of(plan_of(2, world_size=2), "backward")
    assert "micro_batch_gradients" not in one
    for zero, own in (({}, one["gradients"]), (ON_HOST, 0)):
        plan = plan_of(2, world_size=2, zero=zero, **IN_FP32)
        assert bytes_of(plan, "backward").get("micro_batch_gradients", 0) == own
        # The sums go to the step as they are.
        step = bytes_of(plan, "optimizer_step")
        assert step["gradients"] == 2 * PARAMETERS
        assert ("fp32_gradient" in step) is (zero == ON_HOST)

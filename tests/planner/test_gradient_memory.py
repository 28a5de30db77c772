"""Gradients against DeepSpeed's: at stage 2 of one micro-batch or several, in 16 bits and fp32, here and there; and
what is made of them in a step."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from garbage import without_collector
from planned import HIDDEN, INTERMEDIATE, MODEL, PARAMETERS, VOCAB, bytes_of, plan_of
from steps import build_engine, zero_block
from transformers import LlamaConfig, LlamaForCausalLM

from mst_ds.config import TrainConfig
from mst_ds.engine.optimizer import make_optimizer
from mst_ds.memory.live import LiveMemory
from mst_ds.zero import read_zero

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

ON_HOST = {"offload_optimizer": {"device": "cpu", "pin_memory": False}}
IN_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
# Holds the weights of attention and the norms; the MLPs', the embedding and the head are larger.
BUCKET = {"reduce_bucket_size": 10_000}
CASES: dict[str, dict[str, Any]] = {
    "one micro-batch": {},
    "two": {"gradient_accumulation_steps": 2},
    "two, offloaded": {"gradient_accumulation_steps": 2, "zero": ON_HOST},
    "two in fp32": {"gradient_accumulation_steps": 2, **IN_FP32},
    "two in fp32, offloaded": {"gradient_accumulation_steps": 2, "zero": ON_HOST, **IN_FP32},
    "two, bucketed": {"gradient_accumulation_steps": 2, "zero": BUCKET},
    "two, bucketed, offloaded": {"gradient_accumulation_steps": 2, "zero": BUCKET | ON_HOST},
    "two in fp32, bucketed": {"gradient_accumulation_steps": 2, "zero": BUCKET, **IN_FP32},
}
# Stages whose gradients go to the step in 16 bits, and what is made for it; at stage 3 gradients are there before.
STEPS = {
    1: ("gradients", "flat_gradient", "fp32_gradient"),
    2: ("gradients", "flat_gradient", "fp32_gradient"),
    3: ("flat_gradient", "fp32_gradient"),
}


def bytes_of_backwards_and_steps(rank: int) -> tuple[dict[str, int], dict[int, int]]:
    backwards = {name: _most_after_backward(**case) for name, case in CASES.items()}
    return backwards, {stage: _most_in_step(stage) for stage in STEPS}


def _engine(stage: int, zero: dict[str, Any] | None = None, **more: Any) -> DeepSpeedEngine:
    ds_config: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
        "zero_optimization": zero_block(stage, **{"reduce_bucket_size": 1000, **(zero or {})}),
        **more,
    }
    model = LlamaForCausalLM(LlamaConfig(**MODEL.to_dict()))
    optimizer = make_optimizer(model, TrainConfig(), read_zero(ds_config, dp_world_size=2))
    return build_engine(model, optimizer=optimizer, **ds_config)


def _most_after_backward(*, gradient_accumulation_steps: int = 1, **more: Any) -> int:
    """Of tensors that a first step has made, where most are there after the backward of a micro-batch."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    engine = _engine(2, gradient_accumulation_steps=gradient_accumulation_steps, **more)
    ids, memory, found = torch.arange(8)[None], LiveMemory(), []

    def report(optimizer: Any, moment: str, elements: int) -> None:
        if moment == "In ipg_epilogue after reduce_ipg_grads":  # none is freed yet
            dist.barrier()  # a thread of gloo's may hold the last gradient that was reduced
            gc.collect()  # what a backward has left in circles
            found.append(memory.live)

    with patch.object(DeepSpeedZeroOptimizer, "report_ipg_memory_usage", report), memory:
        for _ in range(gradient_accumulation_steps):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
    engine.destroy()
    return max(found)


def _most_in_step(stage: int) -> int:
    """Of tensors that are gone after it; in the second step, before which the optimizer has its moments."""
    engine, ids, memory = _engine(stage, gradient_accumulation_steps=1), torch.arange(8)[None], LiveMemory()
    with memory:
        for _ in range(2):
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            with without_collector():
                memory.reset_peak()
                engine.step()
    found = memory.peak - memory.live
    engine.destroy()
    return found


def test_what_is_there_after_a_backward_and_in_a_step_is_planned() -> None:
    names = ("gradients", "micro_batch_gradients", "reduce_bucket")
    measured = run_ranks(bytes_of_backwards_and_steps, 2)
    for name, case in CASES.items():
        terms = bytes_of(plan_of(2, world_size=2, **case), "backward")
        planned = sum(terms.get(each, 0) for each in names)
        # Loss, norms and the like.
        assert max(each[name] for each, _ in measured) == pytest.approx(planned, abs=1000), name
    for stage, names in STEPS.items():
        terms = bytes_of(plan_of(stage, world_size=2), "optimizer_step")
        planned = sum(terms[each] for each in names)
        assert max(each[stage] for _, each in measured) == pytest.approx(planned, rel=0.01), stage


def test_of_one_micro_batch_only_sums_in_fp32_are_beside_its_gradients() -> None:
    assert "micro_batch_gradients" not in bytes_of(plan_of(2, world_size=2), "backward")
    for zero, is_there in (({}, True), (ON_HOST, False)):
        plan = plan_of(2, world_size=2, zero=zero, **IN_FP32)
        assert ("micro_batch_gradients" in bytes_of(plan, "backward")) is is_there
        # The sums go to the step as they are.
        step = bytes_of(plan, "optimizer_step")
        assert step["gradients"] == 2 * PARAMETERS
        assert ("fp32_gradient" in step) is (zero == ON_HOST)
        assert "flat_gradient" not in step


def test_at_stage_1_all_gradients_have_the_dtype_of_the_sums() -> None:
    """By what DeepSpeed's source says; not measured."""
    for given, size in (({}, 2), (IN_FP32, 4)):
        backward = bytes_of(plan_of(1, world_size=2, seq_len=8, **given), "backward")
        assert backward["gradients"] == size * PARAMETERS
        assert backward["averaged_gradients"] == size * PARAMETERS // 2


EMBEDDING, MLP = VOCAB * HIDDEN, HIDDEN * INTERMEDIATE


@pytest.mark.parametrize(
    ("bucket", "own"),
    # A rank has the embedding or the head, and of the nine matrices of MLPs five, of which the border cuts one.
    [(MLP - 1, EMBEDDING + 5 * MLP), (MLP, EMBEDDING), (EMBEDDING, 0)],
)
@pytest.mark.parametrize(
    "case", [{"zero": ON_HOST}, IN_FP32, {"zero": ON_HOST, **IN_FP32}], ids=["host", "fp32", "both"]
)
def test_gradients_in_the_bucket_do_not_count_twice(case: dict[str, Any], bucket: int, own: int) -> None:
    zero = {"reduce_bucket_size": bucket, **case.get("zero", {})}
    plan = plan_of(2, world_size=2, gradient_accumulation_steps=2, **{**case, "zero": zero})
    assert bytes_of(plan, "backward").get("micro_batch_gradients", 0) == 2 * own

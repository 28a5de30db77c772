"""When the loop gives up, and what it measures of its first step."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import deepspeed
import pytest
import torch
from checkpoints import resumable
from distributed import run_ranks
from steps import build_engine
from tiers import slow_but_for
from tiny import tiny_llama

from mst_ds import GIB, make_plan
from mst_ds.config import NonFinite
from mst_ds.memory.phases import PhaseMeter
from mst_ds.objectives import CROSS_ENTROPY, Measured
from mst_ds.training import loop
from mst_ds.training.loop import StepResult


class Logged:
    """In place of a `MetricsWriter`."""

    def __init__(self) -> None:
        self.memory_of_steps: list[int] = []
        self.skipped: list[bool] = []
        self.memory: list[tuple[int, Any]] = []

    def log_step(self, step: int, *, device_memory_bytes: int, is_skipped: bool, **_: Any) -> None:
        self.memory_of_steps.append(device_memory_bytes)
        self.skipped.append(is_skipped)

    def log_memory(self, step: int, phases: Any) -> None:
        self.memory.append((step, phases))


def take_steps(max_steps: int, *, device: str = "cpu", dtype: str = "fp32", **settings: Any) -> Logged:
    """What `train` logs where `loop.train_step` is the test's own."""
    module = torch.nn.Module()
    module.base_model = torch.nn.Identity()
    engine: Any = SimpleNamespace(device=torch.device(device), module=module, get_lr=lambda: [0.1])
    logged: Any = Logged()
    ds_config = {} if dtype == "fp32" else {dtype: {"enabled": True}, "zero_optimization": {"stage": 1}}
    plan = make_plan("small_llama", ds_config, world_size=1, seq_len=32, device_memory=GIB)
    loop.train(engine, plan, itertools.repeat({}), logged, max_steps=max_steps, **settings)
    return cast("Logged", logged)


def skips(
    monkeypatch: pytest.MonkeyPatch, result: StepResult, non_finite: NonFinite, *, has_loss_scale: bool = False
) -> bool:
    """Whether step 7, with this result, is logged as one that was left out."""
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: result)
    monkeypatch.setattr(loop, "compare", lambda plan, peaks, device: peaks)
    dtype = "fp16" if has_loss_scale else "fp32"
    (skipped,) = take_steps(7, steps_done=6, dtype=dtype, non_finite=non_finite).skipped
    return skipped


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (StepResult(float("nan"), 1.0, float("nan"), False), "loss"),
        (StepResult(1.0, float("inf"), 1.0, False), "gradient norm"),
    ],
)
def test_a_step_that_is_not_finite_ends_the_run_or_is_skipped(
    monkeypatch: pytest.MonkeyPatch, result: StepResult, name: str
) -> None:
    with pytest.raises(FloatingPointError, match=f"the {name} of step 7 is (nan|inf).*--non_finite skip"):
        skips(monkeypatch, result, "stop")
    assert skips(monkeypatch, result, "skip")


def test_a_step_that_is_finite_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not skips(monkeypatch, StepResult(1.0, 1.0, 1.0, True), "skip", has_loss_scale=True)


def test_what_changed_weights_is_never_taken_for_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FloatingPointError, match="the loss of step 7"):
        skips(monkeypatch, StepResult(float("inf"), 1.0, 1.0, True), "skip")


@pytest.mark.parametrize("non_finite", ["stop", "skip"])
def test_in_fp16_a_gradient_that_is_not_finite_is_a_skipped_step(
    monkeypatch: pytest.MonkeyPatch, non_finite: NonFinite
) -> None:
    assert skips(monkeypatch, StepResult(1.0, float("inf"), 1.0, False), non_finite, has_loss_scale=True)


def poisoned(rank: int, stage: int) -> list[Any]:
    """Three steps, of which the second has a gradient that is not a number, on rank 1 of 2."""
    engine = build_engine(tiny_llama(), **resumable(stage))
    weight = engine.module.lm_head.weight
    results, weights = [], []
    for step in (1, 2, 3):
        handle = None
        if step == 2 and rank == 1:
            handle = weight.register_hook(lambda gradient: gradient * float("nan"))
        ids = torch.randint(5, 60, (1, 32), generator=torch.Generator().manual_seed(step))
        results.append(loop.train_step(engine, [{"input_ids": ids, "labels": ids, "shift_labels": ids}]))
        if handle is not None:
            handle.remove()
        with deepspeed.zero.GatheredParameters([weight]):
            weights.append(weight.detach().clone())
    changed = [result.changed_weights for result in results]
    finite = [math.isfinite(result.grad_norm) for result in results]
    return [changed, finite, weights[0].equal(weights[1]), weights[1].equal(weights[2]), engine.skipped_steps]


@pytest.mark.parametrize("stage", slow_but_for([3], range(4)))
def test_a_gradient_that_is_not_a_number_changes_no_weight(stage: int) -> None:
    for result in run_ranks(poisoned, 2, stage):
        assert result == [[True, False, True], [True, False, True], True, False, 1]


@pytest.mark.parametrize(("device", "expected"), [("cuda", [900, 900, 900, 950]), ("cpu", [100, 200, 400, 950])])
def test_the_first_step_is_measured_and_the_peak_over_the_run_outlives_the_reset(
    monkeypatch: pytest.MonkeyPatch, device: str, expected: list[int]
) -> None:
    peaks, meters = {"forward": 300, "backward": 900}, []

    def train_step(engine: Any, micro_batches: Any, meter: PhaseMeter | None = None, *, objective: Any) -> StepResult:
        meters.append(meter)
        assert objective is CROSS_ENTROPY
        if isinstance(meter, PhaseMeter):
            meter.peaks = dict(peaks)
        return StepResult(1.0, 1.0, 1.0, True)

    # After a reset the allocator reports what came since.
    reported = iter([100, 200, 400, 950])
    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.setattr(loop, "compare", lambda plan, peaks, device: peaks)
    monkeypatch.setattr(loop, "peak_memory_bytes", lambda device: next(reported))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda device: None)
    profile: Any = nullcontext()
    profile.step = 3
    logged = take_steps(4, device=device, profile=profile)
    # The one that the profile names is profiled.
    assert isinstance(meters[0], PhaseMeter)
    assert meters[1:] == [None, profile, None]
    assert logged.memory == [(1, peaks)]
    assert logged.memory_of_steps == expected


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_ends_its_phases_in_order(accumulation: int) -> None:
    events: list[str] = []

    class Engine:
        device = torch.device("cpu")
        count = 0

        def __call__(self, **_: Any) -> Any:
            events.append("model")
            return SimpleNamespace(loss=torch.ones(()))

        def is_gradient_accumulation_boundary(self) -> bool:
            return (self.count + 1) % accumulation == 0

        def backward(self, *_: Any, **__: Any) -> None:
            events.append("gradients")

        def step(self) -> None:
            self.count += 1
            events.append("update")

        train = staticmethod(lambda: None)
        zero_optimization_stage = staticmethod(lambda: 3)
        get_global_grad_norm = staticmethod(lambda: 1.0)
        was_step_applied = staticmethod(lambda: True)

    batch = {"shift_labels": torch.ones(1, 4, dtype=torch.long)}
    engine: Any = Engine()
    meter: Any = SimpleNamespace(end=events.append)
    loop.train_step(engine, [batch] * accumulation, meter)
    micro_batch = ["model", "loss", "gradients", "backward", "update"]
    assert events == micro_batch * accumulation + ["optimizer_step"]


class SumOfIds:
    """An objective that no model computes: each id is an item, and its loss."""

    def num_items(self, batch: Any) -> int:
        return int(batch["input_ids"].numel())

    def measure(self, model: Any, batch: Any, num_items: Any) -> Measured:
        ids = batch["input_ids"]
        chosen = {"id": ids, "large": ids[ids > 3], "none": ids[:0]}
        sums = {name: torch.tensor([each.sum(), len(each)]) for name, each in chosen.items()}
        return Measured(ids.sum() * model.weight / num_items, sums)


@pytest.mark.usefixtures("group_of_one")
def test_another_objective_decides_what_counts_and_what_is_minimised() -> None:
    weight, gradients = torch.ones((), requires_grad=True), []
    engine: Any = SimpleNamespace(
        device=torch.device("cpu"),
        weight=weight,
        train=lambda: None,
        eval=lambda: None,
        backward=lambda loss, **_: gradients.append(torch.autograd.grad(loss, weight)[0].item()),
        step=lambda: None,
        is_gradient_accumulation_boundary=lambda: True,
        zero_optimization_stage=lambda: 3,
        get_global_grad_norm=lambda: 1.0,
        was_step_applied=lambda: True,
        empty_partition_cache=lambda: None,
    )
    batches = [{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3, 4, 5])}]
    # One item, one weight: 15 / 5, of which the batches have 3 / 5 and 12 / 5.
    result = loop.train_step(engine, batches, objective=SumOfIds())
    assert result.loss == pytest.approx(3)
    assert gradients == pytest.approx([0.6, 2.4])
    metrics = {"id": pytest.approx(3), "large": pytest.approx(4.5)}
    assert result.metrics == metrics
    assert loop.evaluate(engine, batches, objective=SumOfIds()) == (pytest.approx(3), metrics)

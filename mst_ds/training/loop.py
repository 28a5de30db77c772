"""The training loop: accumulation, step, evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mst_ds.config import NonFinite
from mst_ds.data import Batch, to_device
from mst_ds.memory.out_of_memory import during
from mst_ds.memory.phases import PhaseMeter, compare
from mst_ds.metrics import MetricsWriter, peak_memory_bytes
from mst_ds.objectives import CROSS_ENTROPY, Objective
from mst_ds.planner import Plan
from mst_ds.training.step_profile import StepProfile

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def train(
    engine: DeepSpeedEngine,
    plan: Plan,
    batches: Iterator[Batch],
    metrics: MetricsWriter,
    *,
    max_steps: int,
    steps_done: int = 0,
    eval_steps: int = 1,
    held_out: Iterable[Batch] | None = None,
    objective: Objective = CROSS_ENTROPY,
    non_finite: NonFinite = "stop",
    after_step: Callable[[int, float | None], bool] = lambda step, eval_loss: False,
    profile: StepProfile | None = None,
) -> bool:
    """Take the optimizer steps from `steps_done` to `max_steps`, logging each; evaluate every `eval_steps` of them, and
    at the end.

    The first is measured: planned and measured memory of each phase are logged with it.

    Args:
        batches: this rank's shards, see `mst_ds.data.shard`; `gradient_accumulation_steps` of them make a step.
        held_out: the batches of an evaluation, equally many on every rank; each goes through them from the first on.
            None: no evaluation.
        objective: what steps and evaluations compute.
        non_finite: what a step does whose loss or gradient norm is NaN or inf: end the run, or change no weight and
            be counted.
        after_step: is told the number of a step that is done, and its loss on `held_out`, None without an evaluation;
            whether to stop there, the same on every rank.
        profile: of the step that it names, on this rank.

    Returns:
        Whether the last step was reached.

    Raises:
        FloatingPointError: the loss or gradient norm of a step is not finite, and that ends the run. Every rank raises
            it. (In fp16 a gradient that is not finite is always skipped, to go on with a smaller loss scale.)
    """
    tokens = plan.seq_len * plan.micro_batch_size * plan.dp_size * plan.gradient_accumulation_steps
    measured_peak = 0
    for step in range(steps_done + 1, max_steps + 1):
        meter: PhaseMeter | StepProfile | None = None
        if step == steps_done + 1:
            meter = PhaseMeter(engine.module, engine.device)
        elif profile is not None and step == profile.step:
            meter = profile
        taken = _take_step(engine, plan, batches, objective, meter)
        if taken.peaks:
            metrics.log_memory(step, compare(plan, taken.peaks, engine.device))
            # The meter has reset the allocator's peak; the CPU has none.
            measured_peak = 0 if engine.device.type == "cpu" else max(taken.peaks.values())
        result = taken.result
        metrics.log_step(
            step,
            loss=result.loss,
            tokens_per_second=tokens / taken.seconds,
            grad_norm=result.grad_norm,
            learning_rate=taken.learning_rate,
            device_memory_bytes=max(measured_peak, peak_memory_bytes(engine.device)),
            seconds=taken.seconds,
            tokens=tokens,
            is_skipped=_is_skipped(step, result, non_finite, has_loss_scale=plan.dtype == "fp16"),
            metrics=result.metrics,
        )
        eval_loss = None
        if held_out is not None and (step % eval_steps == 0 or step == max_steps):
            eval_loss, measured = evaluate(engine, held_out, objective)
            metrics.log_eval(step, eval_loss, measured)
        if after_step(step, eval_loss):
            return step == max_steps
    return True


@dataclass(frozen=True)
class StepResult:
    """The mean loss over all items of a step, and its gradient norm before clipping.

    own_loss: this rank's part of the loss. changed_weights: not so where the gradient norm was not finite. metrics:
    what the objective measures beside the loss.
    """

    loss: float
    grad_norm: float
    own_loss: float
    changed_weights: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _TakenStep:
    """peaks: bytes of each phase, where the step was measured."""

    result: StepResult
    learning_rate: float
    seconds: float
    peaks: Mapping[str, int]


def _take_step(
    engine: DeepSpeedEngine,
    plan: Plan,
    batches: Iterator[Batch],
    objective: Objective,
    meter: PhaseMeter | StepProfile | None,
) -> _TakenStep:
    start = time.perf_counter()
    learning_rate = engine.get_lr()[0]
    micro_batches = [next(batches) for _ in range(plan.gradient_accumulation_steps)]
    with meter or nullcontext():
        result = train_step(engine, micro_batches, meter, objective=objective)
    peaks = meter.peaks if isinstance(meter, PhaseMeter) else {}
    return _TakenStep(result, learning_rate, time.perf_counter() - start, peaks)


class StepMeter(Protocol):
    """Is told when a phase of a step is over: the loss, the backward, the optimizer's step."""

    def end(self, phase: str) -> None: ...


def train_step(
    engine: DeepSpeedEngine,
    micro_batches: list[Batch],
    meter: StepMeter | None = None,
    *,
    objective: Objective = CROSS_ENTROPY,
) -> StepResult:
    """One optimizer step over `micro_batches` of every rank.

    One item, one weight: each micro-batch's loss is the sum over its items (of cross-entropy the labels that count)
    divided by the number of items of the whole step, over ranks and micro-batches. DeepSpeed averages gradients over
    all ranks, at every ZeRO stage and however it communicates, because it knows nothing of sequence parallelism; so the
    world size undoes that average.

    Args:
        meter: is told when a phase of the step ends.

    Raises:
        OutOfMemoryError: memory ran out on this rank, with the phase that it was in.
    """
    engine.train()
    num_items = _sum_over_ranks(_count(objective, micro_batches, engine.device))
    total = torch.zeros((), device=engine.device, dtype=torch.float32)
    metrics: dict[str, Tensor] = {}
    norm_of_stage_0 = None

    def end(phase: str) -> None:
        if meter is not None:
            meter.end(phase)

    for batch in micro_batches:
        with during("forward", "loss"):
            measured = objective.measure(engine, to_device(batch, engine.device), num_items)
        end("loss")
        with during("backward"):
            engine.backward(measured.loss * dist.get_world_size(), scale_wrt_gas=False)
        end("backward")
        takes_step = engine.is_gradient_accumulation_boundary()
        if takes_step and engine.zero_optimization_stage() == 0:
            # Without ZeRO DeepSpeed clips by torch's function and keeps no norm.
            gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
            norm_of_stage_0 = torch.nn.utils.get_total_norm(gradients)
        with during("optimizer_step"):
            if norm_of_stage_0 is None or norm_of_stage_0.isfinite():
                engine.step()
            else:
                _leave_out_step(engine)
        if takes_step:
            end("optimizer_step")
        total += measured.loss.detach()
        _add(metrics, measured.metrics)
    norm = engine.get_global_grad_norm() if norm_of_stage_0 is None else norm_of_stage_0
    own_loss = total.item()
    return StepResult(_sum_over_ranks(total).item(), float(norm), own_loss, engine.was_step_applied(), _means(metrics))


def _leave_out_step(engine: DeepSpeedEngine) -> None:
    """What ZeRO's optimizers do with gradients that are not finite, for torch's at stage 0."""
    optimizer, step = engine.optimizer, engine.optimizer.step
    # The engine asks for the attribute, and then neither counts the step as taken nor moves the schedule on.
    optimizer.step, optimizer.overflow = (lambda: None), True
    try:
        engine.step()
    finally:
        optimizer.step, optimizer.overflow = step, False


def _is_skipped(step: int, result: StepResult, non_finite: NonFinite, *, has_loss_scale: bool) -> bool:
    """Whether the step was left out, as it may be; see `train` for what is raised."""
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return False
    is_of_loss = not math.isfinite(result.loss)
    may_skip = non_finite == "skip" or (has_loss_scale and not is_of_loss)
    if may_skip and not result.changed_weights:
        return True
    name, value = ("loss", result.loss) if is_of_loss else ("gradient norm", result.grad_norm)
    where = _ranks_where(not math.isfinite(result.own_loss)) if is_of_loss else ""
    raise FloatingPointError(
        f"the {name} of step {step} is {value}{where}: lower the learning rate, look at the data of that step, or go "
        "on without such steps by --non_finite skip"
    )


def _ranks_where(is_here: bool) -> str:
    """Names the ranks, for a message. A collective call."""
    found: list[bool] = [is_here]
    if dist.is_initialized():
        found = [False] * dist.get_world_size()
        dist.all_gather_object(found, is_here)
    return "".join(f", on rank {rank}" for rank, is_there in enumerate(found) if is_there)


@torch.no_grad()
def evaluate(
    engine: DeepSpeedEngine, batches: Iterable[Batch], objective: Objective = CROSS_ENTROPY
) -> tuple[float, dict[str, float]]:
    """The mean loss and metrics over all items of `batches`, of all ranks together; 0 where there is none."""
    engine.eval()
    loss = torch.zeros((), device=engine.device, dtype=torch.float64)
    num_items = torch.zeros((), device=engine.device, dtype=torch.int64)
    metrics: dict[str, Tensor] = {}
    for batch in batches:
        num_items += _count(objective, [batch], engine.device)
        measured = objective.measure(engine, to_device(batch, engine.device), 1)
        loss += measured.loss
        _add(metrics, measured.metrics)
    end_forwards(engine)
    return _sum_over_ranks(loss).item() / max(1, int(_sum_over_ranks(num_items))), _means(metrics)


def end_forwards(engine: DeepSpeedEngine) -> None:
    """After forwards without a backward: back to training, and nothing is in flight. A collective call.

    ZeRO-3 may have begun to fetch for a backward that does not come, and who gathers such a parameter, as an export
    does, fails.
    """
    engine.train()
    engine.empty_partition_cache()


def _count(objective: Objective, batches: list[Batch], device: torch.device) -> Tensor:
    num_items = torch.tensor(sum(objective.num_items(batch) for batch in batches))
    return num_items.to(device, non_blocking=True)


def _add(sums: dict[str, Tensor], metrics: Mapping[str, Tensor]) -> None:
    for name, value in metrics.items():
        sums[name] = sums[name] + value if name in sums else value


def _means(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Over all ranks, which have the same names, since all have batches of one kind; of what there is any."""
    if not metrics:
        return {}
    sums = _sum_over_ranks(torch.stack([each.double() for each in metrics.values()])).tolist()
    return {name: total / number for name, (total, number) in zip(metrics, sums, strict=True) if number}


def _sum_over_ranks(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value

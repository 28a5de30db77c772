"""What a run measured of its machine, for the plans of other runs there: rates, reserve, the host beside the plan."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from mst_ds.gpus import AS_PREDICTED, CPU, Attained, Gpu
from mst_ds.planner.cost import StepTimes, step_times
from mst_ds.planner.request import Request
from mst_ds.planner.types import Plan

_LEAST_STEPS = 3
# The part of a step, or of a micro-batch, that is more than what no clock tells from nothing.
_SEEN = 0.03
_COMPUTED = ("matrices", "attention", "passes")


@dataclass(frozen=True)
class Calibration:
    """Of a run that has ended.

    Attributes:
        run: its folder.
        gpu: with the shares of its rates that the run attained: one for everything, or where the run was profiled one
            for each kind of work.
        predicted_seconds, measured_seconds: of a step of it, before; the median of those that are as any other.
        reserve: bytes of the device that no tensor had at its peak; None where there is no accelerator.
        process_bytes: what a process of it took on the host before there was a model; None likewise.
    """

    run: Path
    gpu: Gpu
    predicted_seconds: float
    measured_seconds: float
    reserve: int | None
    process_bytes: int | None


def calibration_record(
    request: Request,
    plan: Plan,
    *,
    steps_done: int,
    profiled_step: int | None,
    profile: Mapping[str, float] | None,
    reserve: int | None,
    process_bytes: int,
) -> dict[str, Any]:
    """What a run's summary keeps for `read_calibration`.

    Args:
        plan: what was made of the request.
        steps_done: before the run was resumed with this plan: they may have had other ranks and batches.
        profiled_step: its number; None likewise.
        profile: the seconds of a `StepProfile`; None, or empty: no step was profiled.
        reserve, process_bytes: as measured, see `Calibration`. On a CPU the host is the device.
    """
    gpu = _rates_of_run(request)
    work = request.work.with_settings(**dataclasses.asdict(plan.settings))
    return {
        "gpu": {name: value for name, value in dataclasses.asdict(gpu).items() if name != "attained"},
        "predicted_seconds": dataclasses.asdict(step_times(work, replace(gpu, attained=AS_PREDICTED))),
        "steps_done": steps_done,
        "profiled_step": profiled_step,
        "profiled_seconds": profile or None,
        "reserve_bytes": reserve,
        "process_bytes": None if reserve is None else process_bytes,
    }


def _rates_of_run(request: Request) -> Gpu:
    """Those of the run's GPU. One that has no name here counts as one of the same make as the default's, and its
    attained share says how much slower it is."""
    if request.times_are_known:
        return request.rates
    capability = request.work.capability
    if capability is None:
        return CPU
    return replace(request.rates, name="GPU", memory=request.least_device_memory, capability=capability)


def read_calibration(folder: str | os.PathLike[str]) -> Calibration:
    """Reads the output folder of a run.

    Raises:
        ValueError: no run that has ended, too few steps, or one of a version that kept nothing for this.
    """
    run = Path(folder)
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        logged = [each for each in map(json.loads, lines) if isinstance(each, dict) and each.get("seconds")]
    except OSError as error:
        raise ValueError(
            f"calibrate is {str(run)!r}, where {Path(error.filename).name} cannot be read ({error.strerror}); allowed: "
            "the output folder of a run that has ended"
        ) from None
    except ValueError:
        raise ValueError(
            f"calibrate is {str(run)!r}, whose summary.json or metrics.jsonl is no JSON; allowed: a run's folder"
        ) from None
    record = summary.get("calibration") if isinstance(summary, dict) else None
    if record is None:
        raise ValueError(f"calibrate is {str(run)!r}, a run with no record for this; allowed: a run of this version")
    try:
        steps, skipped = _steps(logged, record["steps_done"])
        # The first one compiles, and is measured by phases; a profile slows its own.
        counted = {step: seconds for step, seconds in steps.items() if step not in skipped}
        for step in (record["steps_done"] + 1, record["profiled_step"]):
            counted.pop(step, None)
        if len(steps) >= _LEAST_STEPS and counted:
            return _calibration(run, record, median(counted.values()), is_skipped=record["profiled_step"] in skipped)
    except (KeyError, TypeError):
        raise ValueError(
            f"calibrate is {str(run)!r}, whose record is of another version; allowed: a run of this one"
        ) from None
    resumed = f" after step {record['steps_done']}, where it was resumed" if record["steps_done"] else ""
    left_out = f", {len(skipped)} of them skipped" if skipped else ""
    raise ValueError(
        f"calibrate is {str(run)!r}, a run with {len(steps)} steps{resumed}{left_out}; allowed: one of {_LEAST_STEPS} "
        "steps or more"
    )


def _steps(logged: Sequence[Mapping[str, Any]], steps_done: int) -> tuple[dict[int, float], set[int]]:
    """The seconds of each step after these, and those of them that changed no weight: their optimizer did nothing."""
    steps, skipped, before = {}, set(), 0
    for values in logged:
        step, so_far = values["step"], values.get("skipped_steps", 0)
        if step > steps_done:
            steps[step] = values["seconds"]
            if so_far > before:
                skipped.add(step)
        before = so_far
    return steps, skipped


def _calibration(run: Path, record: Mapping[str, Any], measured: float, *, is_skipped: bool) -> Calibration:
    """
    Args:
        measured: seconds of a step.
        is_skipped: whether the optimizer did nothing in the step that was profiled.
    """
    predicted, of_gpu = StepTimes(**record["predicted_seconds"]), record["gpu"]
    attained = attained_of(predicted, measured, None if is_skipped else record["profiled_seconds"])
    gpu = Gpu(**{**of_gpu, "capability": tuple(of_gpu["capability"]), "attained": attained})
    return Calibration(run, gpu, predicted.of_step, measured, record["reserve_bytes"], record["process_bytes"])


def attained_of(predicted: StepTimes, measured: float, profiled: Mapping[str, float] | None) -> Attained:
    """The shares with which the prediction of a run's step is what it measured.

    Args:
        predicted: at shares of 1.
        measured: seconds of a step.
        profiled: see `calibration_record`; None, or without a kernel that computes, as where a driver shows none: one
            share of all.
    """
    if profiled is None or not any(profiled[kind] for kind in _COMPUTED):
        share = predicted.of_step / measured
        return Attained(*(share for _ in dataclasses.fields(Attained)))
    # A profile slows what it measures, and no step takes as long as another.
    whole = predicted.micro_batches * profiled["micro-batch"] + profiled["optimizer"]
    seconds = {kind: value * measured / whole for kind, value in profiled.items()}
    micro_batch, computing = seconds["micro-batch"], sum(seconds[kind] for kind in _COMPUTED)
    # Streams of a device compute at the same time, but no longer than all of it takes.
    of_computing = min(computing, micro_batch)
    parts = {kind: seconds[kind] * of_computing / computing for kind in _COMPUTED}
    shares = {kind: _share(getattr(predicted, kind), parts[kind], of=micro_batch) for kind in _COMPUTED}
    if any((getattr(predicted, kind) > 0) != (seconds[kind] > 0) for kind in _COMPUTED):
        # The kernels of one kind have names of another's, as attention has that is products and a softmax.
        shares = dict.fromkeys(_COMPUTED, predicted.computing / of_computing)
    optimizer = _share(predicted.optimizer, seconds["optimizer"], of=measured)
    # With what parts that are too small for a share take longer than predicted.
    rest = (measured - predicted.optimizer / optimizer) / predicted.micro_batches
    rest -= sum(getattr(predicted, kind) / shares[kind] for kind in _COMPUTED)
    has_links = predicted.waits + predicted.collectives + predicted.host_copies > 0
    if predicted.launches_wait and not has_links and predicted.passes:
        # Nothing is waited for. Tensors that are made and freed, inside of operators and between them, take what their
        # sizes are: of four times the tokens this rest was three times as much.
        shares["passes"] = predicted.passes / (
            predicted.passes / shares["passes"] + max(0.0, rest - predicted.launches)
        )
        return Attained(**shares, launches=1.0, links=1.0, optimizer=optimizer)
    others = _share_of_others(predicted, micro_batch, rest)
    return Attained(**shares, launches=others, links=others if has_links else 1.0, optimizer=optimizer)


def _share(predicted: float, measured: float, *, of: float) -> float:
    """1 where it is too small to say anything: what a few kernels take by themselves is not their rate, which another
    length or the optimizer of a whole model would have.

    Args:
        of: the seconds that both are a part of.
    """
    is_seen = predicted > 0 and measured > 0 and max(predicted, measured) > _SEEN * of
    return predicted / measured if is_seen else 1.0


def _share_of_others(predicted: StepTimes, micro_batch: float, rest: float) -> float:
    """Of launches, collectives and copies: the rest of a micro-batch waits for some of them, and those that run beside
    what is computed take no more than all of it."""
    beside = max(predicted.collectives, predicted.host_copies, predicted.launches) / micro_batch
    waiting = predicted.waiting / max(rest, _SEEN * micro_batch)
    return max(waiting, beside, 1.0) if rest < _SEEN * micro_batch else max(waiting, beside) or 1.0

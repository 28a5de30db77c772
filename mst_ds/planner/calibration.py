"""What a run measured of its machine, for the plans of other runs there: rates, reserve, the host beside the plan."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from mst_ds.gpus import AS_PREDICTED, CPU, Attained, Gpu
from mst_ds.planner.cost import StepTimes, step_times
from mst_ds.planner.request import Request
from mst_ds.planner.types import Plan

# The first step compiles, and is measured by phases.
_STEPS_BEFORE = 1
_LEAST_STEPS = 3
# The part of a micro-batch that is more than what no clock tells from nothing.
_SEEN = 0.03
_COMPUTED = ("matrices", "attention", "passes")
_KINDS = (*_COMPUTED, "optimizer")


@dataclass(frozen=True)
class Calibration:
    """Of a run that has ended.

    Attributes:
        run: its folder.
        gpu: with the shares of its rates that the run attained: one for everything, or where the run was profiled one
            for each kind of work.
        predicted_seconds, measured_seconds: of a step of it, before; the median of those after the first.
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
    request: Request, plan: Plan, *, profile: Mapping[str, float] | None, reserve: int | None, process_bytes: int
) -> dict[str, Any]:
    """What a run's summary keeps for `read_calibration`.

    Args:
        plan: what was made of the request.
        profile: the seconds of a `StepProfile`; None, or empty: no step was profiled.
        reserve, process_bytes: as measured, see `Calibration`. On a CPU the host is the device.
    """
    gpu = _rates_of_run(request)
    work = request.work.with_settings(**dataclasses.asdict(plan.settings))
    return {
        "gpu": {name: value for name, value in dataclasses.asdict(gpu).items() if name != "attained"},
        "predicted_seconds": dataclasses.asdict(step_times(work, replace(gpu, attained=AS_PREDICTED))),
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
        steps = [each["seconds"] for each in map(json.loads, lines) if "loss" in each and "seconds" in each]
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
    if record is None or len(steps) < _LEAST_STEPS:
        found = "no record for this" if record is None else f"{len(steps)} steps"
        raise ValueError(f"calibrate is {str(run)!r}, a run with {found}; allowed: one of {_LEAST_STEPS} steps or more")
    measured = median(steps[_STEPS_BEFORE:])
    try:
        predicted, of_gpu = StepTimes(**record["predicted_seconds"]), record["gpu"]
        attained = attained_of(predicted, measured, record["profiled_seconds"])
        gpu = Gpu(**{**of_gpu, "capability": tuple(of_gpu["capability"]), "attained": attained})
        return Calibration(run, gpu, predicted.of_step, measured, record["reserve_bytes"], record["process_bytes"])
    except (KeyError, TypeError):
        raise ValueError(
            f"calibrate is {str(run)!r}, whose record is of another version; allowed: a run of this one"
        ) from None


def attained_of(predicted: StepTimes, measured: float, profiled: Mapping[str, float] | None) -> Attained:
    """The shares with which the prediction of a run's step is what it measured.

    Args:
        predicted: at shares of 1.
        measured: seconds of a step.
        profiled: see `calibration_record`.
    """
    if profiled is None:
        share = predicted.of_step / measured
        return Attained(share, share, share, share, share)
    # A profile slows what it measures, and no step takes as long as another.
    whole = predicted.micro_batches * profiled["micro-batch"] + profiled["optimizer"]
    seconds = {kind: value * measured / whole for kind, value in profiled.items()}
    shares = {kind: _share(getattr(predicted, kind), seconds[kind]) for kind in _KINDS}
    rest = seconds["micro-batch"] - sum(seconds[kind] for kind in _COMPUTED)
    return Attained(**shares, others=_share_of_others(predicted, seconds["micro-batch"], rest))


def _share(predicted: float, measured: float) -> float:
    """1 where nothing says what it is."""
    return predicted / measured if predicted > 0 and measured > 0 else 1.0


def _share_of_others(predicted: StepTimes, micro_batch: float, rest: float) -> float:
    """Of launches, collectives and copies: the rest of a micro-batch waits for some of them, and those that run beside
    what is computed take no more than all of it."""
    beside = max(predicted.collectives, predicted.host_copies, predicted.launches) / micro_batch
    if rest < _SEEN * micro_batch:
        return max(1.0, beside)
    return max(predicted.waits / rest, beside) or 1.0

"""What a run measured of its machine, for the plans of other runs there: rates, reserve, the host beside the plan."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from mst_ds.gpus import CPU, Gpu
from mst_ds.planner.cost import step_seconds
from mst_ds.planner.request import Request
from mst_ds.planner.types import Plan

# The first step compiles, and is measured by phases.
_STEPS_BEFORE = 1
_LEAST_STEPS = 3


@dataclass(frozen=True)
class Calibration:
    """Of a run that has ended.

    Attributes:
        run: its folder.
        gpu: with the share of its rates that the run attained.
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


def calibration_record(request: Request, plan: Plan, *, reserve: int | None, process_bytes: int) -> dict[str, Any]:
    """What a run's summary keeps for `read_calibration`.

    Args:
        plan: what was made of the request.
        reserve, process_bytes: as measured, see `Calibration`. On a CPU the host is the device.
    """
    gpu = _rates_of_run(request)
    work = request.work.with_settings(**dataclasses.asdict(plan.settings))
    return {
        "gpu": dataclasses.asdict(gpu),
        "predicted_step_seconds": step_seconds(work, replace(gpu, attained=1.0)),
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
        predicted, of_gpu = record["predicted_step_seconds"], record["gpu"]
        gpu = Gpu(**{**of_gpu, "capability": tuple(of_gpu["capability"]), "attained": predicted / measured})
        return Calibration(run, gpu, predicted, measured, record["reserve_bytes"], record["process_bytes"])
    except (KeyError, TypeError):
        raise ValueError(
            f"calibrate is {str(run)!r}, whose record is of another version; allowed: a run of this one"
        ) from None

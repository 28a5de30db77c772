"""What is known of a point when it is over, and the file that it stands in."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mst_ds.files.whole_file import replace_file

DONE, OUT_OF_MEMORY, FAILED, TIMED_OUT, REFUSED = "done", "out of memory", "failed", "timed out", "refused"
STATUSES = (DONE, OUT_OF_MEMORY, FAILED, TIMED_OUT, REFUSED)
MEASURED = "measured"
FILE_NAME = "result.json"
# Below a sweep's output folder: where the points lie that ran, and those that were predicted.
POINTS, PREDICTED = "points", "predicted"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Of one point. What was not found out is None, or an empty mapping.

    Attributes:
        source: `MEASURED`, or for whom a plan predicts: "predicted for H100".
        status: one of `STATUSES`.
        dp_size: None where `sp_size` does not divide the world.
        steps: that were logged.
        tokens_per_second: of all ranks together; the median of the steps after the first. step_seconds alike.
        tokens_per_step: of all ranks together.
        flops_per_token: model FLOPs, see `mst_ds.model_shape.flops_per_token`.
        planned_bytes, measured_bytes: of device memory in each phase of the first step, without the reserve, on the
            rank that exceeds its plan most.
        loss: of the last step.
        error: one line on what went wrong.
        attempts: launches; a second one where a rank of the first was killed.
        request: train flags and DeepSpeed JSON of the point.
        environment: "device", by its name, and the versions of "python" and of packages; of a run that is done.
    """

    name: str
    source: str
    status: str
    num_nodes: int
    num_gpus: int
    world_size: int
    sp_size: int
    dp_size: int | None
    seq_len: int
    variant: str
    steps: int | None = None
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    tokens_per_step: int | None = None
    flops_per_token: float | None = None
    planned_bytes: Mapping[str, int] = field(default_factory=dict)
    measured_bytes: Mapping[str, int] = field(default_factory=dict)
    loss: float | None = None
    error: str | None = None
    attempts: int = 0
    request: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def planned_peak_bytes(self) -> int | None:
        return max(self.planned_bytes.values(), default=None)

    @property
    def measured_peak_bytes(self) -> int | None:
        return max(self.measured_bytes.values(), default=None)

    @property
    def peak_bytes(self) -> int | None:
        """Measured, where it was."""
        return self.planned_peak_bytes if self.measured_peak_bytes is None else self.measured_peak_bytes

    @property
    def device(self) -> str | None:
        return self.environment.get("device")

    @property
    def is_measured(self) -> bool:
        return self.source == MEASURED


def write_result(folder: Path, result: Result) -> None:
    """At once or not at all, also for a machine that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / FILE_NAME, json.dumps(dataclasses.asdict(result), indent=2) + "\n")


def read_result(folder: Path) -> Result | None:
    """None where the point is not over.

    Raises:
        ValueError: the file is none of ours.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is not a result ({reason}); allowed: to remove it, then the point runs again"
        ) from None
    return result


def read_results(output_dir: Path) -> list[Result]:
    """All that are there: measured ones first, each kind by variant and size.

    Raises:
        ValueError: a file is none of ours.
    """
    paths = [path for kind in (POINTS, PREDICTED) for path in output_dir.glob(f"{kind}/*/{FILE_NAME}")]
    results = [result for path in paths if (result := read_result(path.parent)) is not None]
    return sorted(results, key=_order)


def _order(result: Result) -> tuple[Any, ...]:
    sizes = (result.num_nodes, result.num_gpus, result.sp_size, result.seq_len)
    return (not result.is_measured, result.source, result.variant, *sizes)

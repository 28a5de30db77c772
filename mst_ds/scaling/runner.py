"""One point of a sweep, from its request to its result."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mst_ds.files.whole_file import replace_file
from mst_ds.model_shape import flops_per_token, load_model_shape
from mst_ds.scaling.launchers import Launcher, launch
from mst_ds.scaling.outcome import Outcome, judge, read_environment, read_metrics
from mst_ds.scaling.result import MEASURED, POINTS, REFUSED, Result, read_result, write_result
from mst_ds.scaling.sweep import Point, Sweep

# A rank that is killed by someone else's doing says nothing of the point. Twice is no accident.
_ATTEMPTS = 2
_METRICS = "metrics.jsonl"


def check_results(sweep: Sweep, points: Iterable[Point], output_dir: Path) -> None:
    """Looks at results that are there already, before any point runs.

    Raises:
        ValueError: one is of another request, or none of ours.
    """
    for point in points:
        folder = output_dir / POINTS / point.name
        found = read_result(folder)
        if found is not None:
            _require_same(found, _request(sweep, point), folder)


def run_point(sweep: Sweep, point: Point, output_dir: Path, launcher: Launcher) -> Result | None:
    """Runs the point, unless it has a result already, and writes its result; None while another process is at it.

    The folder of a point that was killed in the middle has no result: it is run from the beginning.

    Raises:
        ValueError: the point has a result, but of another request.
        Interrupted: the sweep is asked to stop.
    """
    folder = output_dir / POINTS / point.name
    folder.mkdir(parents=True, exist_ok=True)
    request = _request(sweep, point)
    try:
        # A lock of the kernel's, which dies with its holder.
        with FileLock(folder / "lock", timeout=0):
            found = read_result(folder)
            if found is None:
                found = _run(sweep, point, folder, request, launcher)
                write_result(folder, found)
    except Timeout:
        return None
    _require_same(found, request, folder)
    return found


def _request(sweep: Sweep, point: Point) -> dict[str, Any]:
    """What the DeepSpeed JSON holds, not where it lies."""
    flags = {name: value for name, value in sweep.flags(point).items() if name != "ds_config"}
    return {"train": flags, "ds_config": sweep.ds_config(point)}


def _require_same(found: Result, request: dict[str, Any], folder: Path) -> None:
    if found.request != request:
        raise ValueError(
            f"{folder} has the result of other flags or another DeepSpeed JSON; allowed: another output_dir, or to "
            "remove that folder"
        )


def _run(sweep: Sweep, point: Point, folder: Path, request: dict[str, Any], launcher: Launcher) -> Result:
    shape = load_model_shape(sweep.train_config(point).model)
    try:
        point.check_sp_size(shape.num_attention_heads)
    except ValueError as error:
        return point_result(point, source=MEASURED, status=REFUSED, error=str(error), request=request)
    ds_config = folder / "ds_config.json"
    replace_file(ds_config, json.dumps(request["ds_config"], indent=2) + "\n")
    output = folder / "run"
    outcome, attempts = _launch(sweep, point, folder, output, ds_config, launcher)
    # Measured once, and of the size of the model.
    shutil.rmtree(output / "model", ignore_errors=True)
    return point_result(
        point,
        source=MEASURED,
        status=outcome.status,
        error=outcome.error,
        attempts=attempts,
        request=request,
        flops_per_token=flops_per_token(shape, point.seq_len),
        environment=read_environment(output / "summary.json"),
        **read_metrics(output / _METRICS),
    )


def _launch(
    sweep: Sweep, point: Point, folder: Path, output: Path, ds_config: Path, launcher: Launcher
) -> tuple[Outcome, int]:
    """What the last launch came to, and how many there were."""
    own = {"seq_len": point.seq_len, "ds_config": ds_config.absolute(), "output_dir": output.absolute()}
    arguments = [f"--{name}={value}" for name, value in {**sweep.flags(point), **own}.items()]
    log = folder / "log.txt"
    for attempt in itertools.count(1):
        shutil.rmtree(output, ignore_errors=True)
        exit_code = launch(launcher, point, arguments, log=log, limit=60 * sweep.time_limit)
        outcome = judge(
            exit_code,
            log.read_text(encoding="utf-8", errors="replace"),
            has_begun=(output / _METRICS).is_file(),
            limit_minutes=sweep.time_limit,
        )
        if attempt == _ATTEMPTS or not outcome.died_silently:
            break
    return outcome, attempt


def point_result(point: Point, **fields: Any) -> Result:
    """A result with the point's own numbers."""
    world_size, sp_size = point.world_size, point.sp_size
    return Result(
        name=point.name,
        num_nodes=point.num_nodes,
        num_gpus=point.num_gpus,
        world_size=world_size,
        sp_size=sp_size,
        dp_size=None if world_size % sp_size else world_size // sp_size,
        seq_len=point.seq_len,
        variant=point.variant.name,
        **fields,
    )

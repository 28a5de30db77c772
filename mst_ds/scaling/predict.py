"""What the planner says of a sweep's points on a GPU that is not here: results without a launch."""

from __future__ import annotations

import functools
from pathlib import Path

from mst_ds.adapter_flags import AdapterRequest
from mst_ds.config import GIB
from mst_ds.model_shape import ModelShape, flops_per_token, load_model_shape
from mst_ds.planner import DEFAULT_RESERVE, Gpu, Plan, plan_of_request, read_request
from mst_ds.scaling.result import DONE, OUT_OF_MEMORY, PREDICTED, REFUSED, Result, write_result
from mst_ds.scaling.runner import point_result
from mst_ds.scaling.sweep import Point, Sweep


def predict_sweep(sweep: Sweep, output_dir: Path, gpu: Gpu, host_memory: int | None = None) -> list[Result]:
    """Writes a result for each point, marked as predicted, in place of an earlier prediction for that GPU.

    Args:
        host_memory: bytes of a node, of which each of its ranks has an equal part; None: not known.

    Raises:
        ValueError: a variant that no point could have.
    """
    results = []
    for point in sweep.points:
        result = _predict(sweep, point, gpu, host_memory)
        write_result(output_dir / PREDICTED / f"{gpu.name}-{point.name}", result)
        results.append(result)
    return results


def _predict(sweep: Sweep, point: Point, gpu: Gpu, host_memory: int | None) -> Result:
    config = sweep.train_config(point)
    shape = _shape(config.model, config.adapters)
    source = f"predicted for {gpu.name}"
    request = {"train": sweep.flags(point), "ds_config": sweep.ds_config(point)}
    try:
        planned = read_request(
            shape,
            request["ds_config"],
            world_size=point.world_size,
            seq_len=point.seq_len,
            device_memory=gpu.memory,
            reserve=DEFAULT_RESERVE,
            host_memory=None if host_memory is None else host_memory // point.num_gpus,
            ranks_per_node=point.num_gpus,
            gpu=gpu,
            train=config,
        )
        plan = plan_of_request(planned)
    except ValueError as error:
        return point_result(point, source=source, status=REFUSED, error=str(error), request=request)
    seconds = plan.predicted_step_seconds if plan.fits else None
    tokens = plan.seq_len * plan.micro_batch_size * plan.dp_size * plan.gradient_accumulation_steps
    return point_result(
        point,
        source=source,
        status=DONE if plan.fits else OUT_OF_MEMORY,
        tokens_per_second=None if seconds is None else tokens / seconds,
        step_seconds=seconds,
        tokens_per_step=tokens,
        flops_per_token=flops_per_token(shape, point.seq_len),
        planned_bytes=_planned_bytes(plan),
        error=None if plan.fits else _excess(plan),
        request=request,
    )


@functools.cache
def _shape(model: str, adapters: AdapterRequest | None) -> ModelShape:
    if adapters is None:
        return load_model_shape(model)
    # torch, transformers and peft, which take seconds to load.
    from mst_ds.adapters import model_on_meta, requested_config
    from mst_ds.model_shape import load_config_of_shape
    from mst_ds.structure.trained import trained_shape

    on_meta, _ = model_on_meta(load_config_of_shape(model), requested_config(adapters))
    return trained_shape(load_model_shape(model), on_meta)


def _planned_bytes(plan: Plan) -> dict[str, int]:
    """By phase, without the reserve: as a run logs it."""
    return {phase.name: phase.device_bytes - phase.kind_bytes("reserve") for phase in plan.phases}


def _excess(plan: Plan) -> str:
    if plan.peak_bytes > plan.device_memory:
        return f"planned are {plan.peak_bytes / GIB:.2f} of {plan.device_memory / GIB:.2f} GiB on the device"
    return f"planned are {plan.host_bytes / GIB:.2f} of {(plan.host_memory or 0) / GIB:.2f} GiB on the host"

"""From a trainer's arguments to the plan of this rank."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from mst_ds.adapters import model_on_meta
from mst_ds.config import AUTO, GIB
from mst_ds.dtypes import DTYPES
from mst_ds.engine.agreement import request_of_all
from mst_ds.engine.hardware import has_accelerator, rank_device_memory, rank_gpu, rank_host_memory
from mst_ds.engine.launch import Launch
from mst_ds.memory.mixers import with_mixers
from mst_ds.model_shape import ModelShape
from mst_ds.planner import DEFAULT_RESERVE, Plan, plan_of_request, read_request
from mst_ds.structure.trained import trained_shape

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, TrainingArguments


def take_mst_block(args: TrainingArguments) -> dict[str, Any] | None:
    """Take the "mst" block out of the DeepSpeed JSON of these arguments: accelerate would ask for a value in place of
    each of its "auto"s. None where there is no block."""
    plugin = args.deepspeed_plugin
    return None if plugin is None else plugin.hf_ds_config.config.pop("mst", None)


def zero_stage(args: TrainingArguments) -> int:
    """Of DeepSpeed, 0 without it."""
    return 0 if args.deepspeed_plugin is None else int(args.deepspeed_plugin.zero_stage)


def plan_of_trainer(
    model: Any,
    args: TrainingArguments,
    accelerator: Accelerator,
    mst: Mapping[str, Any],
    *,
    seq_len: int,
    rows_of_sample: int,
) -> Plan:
    """Plan this rank. A collective call where there are several: chunk counts follow from a rank's own memory, what all
    ranks must do alike from the least.

    Args:
        mst: the "mst" block.
        seq_len: tokens of the longest sequence.
        rows_of_sample: sequences that each sample of a batch has.

    Raises:
        ValueError: a setting that cannot be planned.
    """
    launch = Launch(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        local_rank=accelerator.local_process_index,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)),
    )
    is_known = mst.get("device_memory_gib", AUTO) != AUTO
    read = functools.partial(
        read_request,
        ds_config={**_ds_config(args, model, rows_of_sample), "mst": dict(mst)},
        world_size=launch.world_size,
        seq_len=seq_len,
        device_memory=None if is_known else rank_device_memory(launch),
        # On the CPU no context and no communication buffers stand beside the tensors.
        reserve=DEFAULT_RESERVE if has_accelerator() else 0,
        host_memory=rank_host_memory(launch),
        rank=launch.rank,
        ranks_per_node=launch.local_world_size,
        gpu=rank_gpu(launch),
    )
    shape, plain = _shape(model)
    request = read(shape)
    if shape.mixer_heads:
        request = read(with_mixers(shape, plain, DTYPES[request.work.zero.dtype]))
    plan = plan_of_request(request_of_all(request))
    if not plan.fits:
        # The planner does not know all that a trainer does: a run may fit that it thinks does not.
        warnings.warn(
            f"the plan does not fit: {plan.peak_bytes / GIB:.1f} GiB of {plan.device_memory / GIB:.1f} GiB in the "
            f"{plan.peak_phase.name}; mst-plan says what would make it fit",
            stacklevel=2,
        )
    return plan


def _shape(model: Any) -> tuple[ModelShape, PreTrainedModel]:
    """Of the model as it is trained, counted on one without memory: ZeRO-3 may hold the weights in parts already; and
    that one."""
    peft_config = model.active_peft_config if hasattr(model, "active_peft_config") else None
    with _no_weights_in_parts():
        plain, adapted = model_on_meta(model.config, peft_config)
    is_trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    for name, weight in adapted.named_parameters():
        weight.requires_grad_(is_trained.get(name, weight.requires_grad))
    return trained_shape(ModelShape.from_config(model.config), plain), plain


@contextmanager
def _no_weights_in_parts() -> Iterator[None]:
    """While the arguments of a trainer with ZeRO-3 live, transformers has the weights of each new model in parts."""
    from transformers.integrations import deepspeed

    kept = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = kept


def _ds_config(args: TrainingArguments, model: Any, rows_of_sample: int) -> dict[str, Any]:
    """What the planner reads of the DeepSpeed JSON, or one that stands for training without DeepSpeed."""
    plugin = args.deepspeed_plugin
    if plugin is None:
        is_half = {"bf16": args.bf16 or model.dtype == torch.bfloat16, "fp16": args.fp16}
        config: dict[str, Any] = {name: {"enabled": enabled} for name, enabled in is_half.items()}
        config["zero_optimization"] = {"stage": 0}
    else:
        config = plugin.hf_ds_config.config
    # transformers counts every rank as a data-parallel one, also where several share a sequence; accelerate has
    # DeepSpeed print after an infinite number of steps.
    config = {name: value for name, value in config.items() if name not in ("train_batch_size", "steps_per_print")}
    return {
        **config,
        "train_micro_batch_size_per_gpu": args.per_device_train_batch_size * rows_of_sample,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
    }

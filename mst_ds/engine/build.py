"""From a run to DeepSpeed's engine: the model's weights, its plan, its optimizer, and what a checkpoint holds."""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import deepspeed
import torch.distributed as dist
from transformers import set_seed
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from mst_ds.adapters import add_adapters, model_on_meta
from mst_ds.checkpoint import universal_setting
from mst_ds.cpu_threads import cores_of_node, share_cores
from mst_ds.engine.hardware import has_accelerator
from mst_ds.engine.optimizer import make_optimizer, schedule, setting_of
from mst_ds.engine.run import Run
from mst_ds.kept_in_fp32 import KeptTensor, Loading, keep_in_fp32, kept_in_fp32
from mst_ds.memory.host import give_back_pinned_memory
from mst_ds.model_folder import ModelLayout, load_model
from mst_ds.patching import apply_plan
from mst_ds.sequence_parallel import ProcessSequenceGroup
from mst_ds.zero import has_block

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from torch import nn


def build_engine(run: Run, group: ProcessSequenceGroup | None) -> DeepSpeedEngine:
    """Build the model under its plan and hand it to DeepSpeed, after `meet`. A collective call.

    It has the weights that the run starts from, also where it is to go on from a checkpoint.

    Args:
        group: the ranks that share this rank's sequences, see `new_sequence_group`.
    """
    set_seed(run.config.seed)
    model, kept = _load_model(run)
    # Dropout must not repeat from rank to rank; the weights above must.
    set_seed((run.config.seed + run.launch.rank) % 2**32)
    apply_plan(model, run.plan, sequence_group=group)
    zero = run.request.work.zero
    if has_accelerator() and zero.offloads_optimizer:
        share_cores(cores_of_node())
    has_own_optimizer, has_own_schedule = (has_block(run.ds_config, name) for name in ("optimizer", "scheduler"))
    setting = {} if has_own_optimizer else setting_of(run.config)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        optimizer=None if has_own_optimizer else make_optimizer(model, run.config, zero),
        lr_scheduler=None if has_own_schedule else functools.partial(schedule, run.config),
        config=run.ds_config | universal_setting(run.checkpoint, run.launch.world_size) | setting,
    )
    # DeepSpeed pins the shard of each weight, and then copies all into one block.
    give_back_pinned_memory()
    _limit_waiting(run.config.hang_timeout)
    keep_in_fp32(engine, kept)
    return engine


def _load_model(run: Run) -> tuple[nn.Module, list[KeptTensor]]:
    plain = model_on_meta(run.model_config, None, run.dtype)[0]
    # transformers looks for this object, by a weak reference, to build the weights sharded from the start.
    zero3 = HfDeepSpeedConfig(run.ds_config) if run.plan.zero_stage == 3 else None
    loading = Loading(kept_in_fp32(plain, run.dtype), is_sharded=zero3 is not None)
    with loading.watch():
        model = load_model(
            run.weights,
            run.model_config,
            run.model_class,
            dtype=run.dtype,
            attention=run.own_attention,
            new_lm_head=run.config.new_lm_head,
            stored_vocab_size=run.stored_vocab_size,
            seed=run.config.seed,
            whole=run.whole,
        )
    kept = loading.kept(model)
    # transformers has loaded parameters require gradients, also those that the model's own code does not train.
    for name, own in plain.named_parameters():
        model.get_parameter(name).requires_grad_(own.requires_grad)
    trained: Any = model if run.peft_config is None else add_adapters(model, run.peft_config)
    del zero3
    run.layout.require_same(ModelLayout.of(trained))
    if run.adapter is not None:
        run.adapter.load_into(trained)
    return trained.train(), kept


def _limit_waiting(seconds: float) -> None:
    """A process group does not take over the timeout of the world, and DeepSpeed gives its own none."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

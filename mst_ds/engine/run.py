"""A run, and all of its checks that need neither weights nor other processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedConfig

from mst_ds.adapters import load_peft_config, model_on_meta
from mst_ds.checkpoint import Checkpoint, Identity, checkpoints_folder, newest_checkpoint, read_checkpoint
from mst_ds.config import AUTO, TrainConfig
from mst_ds.data import ShardedLoader, TrainingData, load_training_data
from mst_ds.dtypes import DTYPES
from mst_ds.engine.deepspeed_config import require_accepted
from mst_ds.engine.hardware import has_accelerator, rank_device_memory, rank_gpu, rank_host_memory
from mst_ds.engine.launch import Launch
from mst_ds.kept_in_fp32 import kept_in_fp32, require_no_adapters_on
from mst_ds.model_folder import ModelLayout, Weights, find_weights, require_match
from mst_ds.model_shape import ModelShape, load_model_config, require_positions, unknown_positions
from mst_ds.patching import find_parts
from mst_ds.planner import DEFAULT_RESERVE, Plan, Request, make_request, plan_of_request
from mst_ds.preflight import require_exact
from mst_ds.structure import position_table, why_own_attention
from mst_ds.structure.trained import trained_shape
from mst_ds.zero import DsConfig, ResolvedConfig, has_block, kept_blocks, read_resolved

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Run:
    """A run that has passed every check that needs neither weights nor other processes.

    `ds_config` is what DeepSpeed gets: every "auto" filled in, without the "mst" block. `request` is what `plan` was
    made of. `own_attention` is the implementation that transformers loads the model with;
    None leaves that to transformers. `weights` is None where they start from random ones; `layout` is of the model that
    was checked, and `notes` what a user should know of what is loaded. `checkpoint` is what the run goes on from.
    """

    config: TrainConfig
    launch: Launch
    ds_config: DsConfig
    model_config: PreTrainedConfig
    peft_config: PeftConfig | None
    own_attention: str | None
    model_class: type[PreTrainedModel]
    layout: ModelLayout
    weights: Weights | None
    notes: tuple[str, ...]
    plan: Plan
    request: Request
    data: TrainingData
    identity: Identity
    checkpoint: Checkpoint | None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.plan.dtype]

    @property
    def steps_done(self) -> int:
        """Optimizer steps that were taken before this run goes on."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def prepare(config: TrainConfig, launch: Launch) -> Run:
    """Check the whole request and make this rank's plan and data, before weights load or processes meet.

    Raises:
        ValueError: anything in the flags, the DeepSpeed JSON, the model's config or the dataset that cannot run, in one
            line. Every rank finds the same, so all ranks stop.
    """
    _require_unfinished(config)
    model_config = load_model_config(config.model, trust_remote_code=config.trust_remote_code)
    shape = ModelShape.from_config(model_config)
    resolved = read_resolved(
        config.ds_config,
        train=config,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        world_size=launch.world_size,
        ranks_per_node=launch.local_world_size,
        has_accelerator=has_accelerator(),
    )
    require_accepted(resolved.ds_config, resolved.zero)
    peft_config = None if config.peft_config is None else load_peft_config(config.peft_config)
    model, adapted = model_on_meta(model_config, peft_config)
    request = _request(config, launch, trained_shape(shape, model), resolved)
    plan = plan_of_request(request)
    _require_right_training(plan)
    require_positions(position_table(model), config.seq_len)
    beyond = unknown_positions(shape.rotary_positions, config.seq_len)
    find_parts(adapted, plan.settings)
    if peft_config is not None:
        # Adapters change names: those of `model` are no longer the ones that transformers matches.
        plain = model_on_meta(model_config, None)[0]
        require_no_adapters_on(kept_in_fp32(plain, DTYPES[plan.dtype]), adapted)
    own_attention = _own_attention(config, plan, model)
    weights, notes = _weights(config, model, DTYPES[plan.dtype])
    data = load_training_data(config, model_config)
    identity = Identity.of(
        model_config,
        peft_config,
        data.tokenizer,
        dtype=plan.dtype,
        zero_stage=plan.zero_stage,
        training=_kept_settings(config, plan, resolved.ds_config),
    )
    checkpoint = _checkpoint(config, identity)
    run = Run(
        config=config,
        launch=launch,
        ds_config=resolved.ds_config,
        model_config=model_config,
        peft_config=peft_config,
        own_attention=own_attention,
        model_class=type(model),
        layout=ModelLayout.of(adapted),
        weights=weights,
        notes=(*notes, *(warning for warning in (beyond, data.warning) if warning is not None)),
        plan=plan,
        request=request,
        data=data,
        identity=identity,
        checkpoint=checkpoint,
    )
    training_batches(run)
    if config.preflight:
        require_exact(model_config, plan.settings, packed=config.packing == "documents")
    return run


def _request(config: TrainConfig, launch: Launch, shape: ModelShape, resolved: ResolvedConfig) -> Request:
    """What this rank's plan is made of, with its own device's memory for that of all."""
    return make_request(
        shape,
        resolved,
        seq_len=config.seq_len,
        device_memory=rank_device_memory(launch) if resolved.mst.device_memory_gib == AUTO else None,
        # On the CPU no context and no communication buffers stand beside the tensors.
        reserve=DEFAULT_RESERVE if has_accelerator() else 0,
        host_memory=rank_host_memory(launch),
        rank=launch.rank,
        ranks_per_node=launch.local_world_size,
        gpu=rank_gpu(launch),
    )


def _require_right_training(plan: Plan) -> None:
    """Refuse what DeepSpeed computes wrong.

    Raises:
        ValueError: ZeRO stage 0 in 16 bits.
    """
    if plan.zero_stage == 0 and plan.dtype != "fp32":
        # DeepSpeed's optimizer for it takes a step with zero gradients first, and does not scale an fp16 loss.
        raise ValueError(
            f"the ZeRO stage is 0 in {plan.dtype}, which DeepSpeed trains wrong; allowed: 1, 2, 3, or fp32"
        )


def _own_attention(config: TrainConfig, plan: Plan, model: PreTrainedModel) -> str | None:
    """See `Run`.

    Raises:
        ValueError: a model that keeps its own attention is to train on packed documents.
    """
    reason = why_own_attention(model)
    if config.packing == "documents" and reason is not None:
        raise ValueError(f"packing is 'documents', but {type(model).__name__} {reason}; allowed: 'none'")
    # Any other model gets the attention of its plan from apply_plan.
    attention = plan.settings.attention
    return attention if attention != "sdpa" and reason is not None else None


def _weights(config: TrainConfig, model: PreTrainedModel, dtype: torch.dtype) -> tuple[Weights | None, tuple[str, ...]]:
    """What the model starts from, and what a user should know of it.

    Raises:
        ValueError: a weight file is missing or damaged, or the weights are not those of the model.
    """
    weights = find_weights(config.model)
    if weights is not None:
        return weights, require_match(weights, model, dtype=dtype, new_lm_head=config.new_lm_head)
    if config.new_lm_head:
        raise ValueError(f"new_lm_head is true, but model {config.model!r} has no weights; allowed: no --new_lm_head")
    return None, (f"model {config.model!r} has no weights: it starts from random ones",)


def _kept_settings(config: TrainConfig, plan: Plan, ds_config: DsConfig) -> dict[str, Any]:
    """Settings of the optimizer and of the data whose values come from a checkpoint, by who owns them."""
    samples = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.dp_size
    kept: dict[str, Any] = {"seed": config.seed, "samples of a step": samples} | kept_blocks(ds_config)
    if has_block(ds_config, "optimizer"):
        return kept
    names = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    return kept | {name: getattr(config, name) for name in names} | {"learning_rate": config.peak_learning_rate}


def _checkpoint(config: TrainConfig, identity: Identity) -> Checkpoint | None:
    """What the run goes on from.

    Raises:
        ValueError: it is damaged, of a later step than the last or of another `identity`, or the run would overwrite
            another's checkpoints.
    """
    newest = None if config.output_dir is None else newest_checkpoint(checkpoints_folder(config.output_dir))
    if config.resume in (None, AUTO):
        checkpoint = newest
    else:
        checkpoint = read_checkpoint(Path(config.resume).expanduser())
    if newest is not None and (
        config.resume is None or checkpoint is None or not checkpoint.folder.samefile(newest.folder)
    ):
        raise ValueError(
            f"output_dir has a checkpoint of step {newest.step}, which this run would overwrite; allowed: --resume "
            "auto, to go on from it, or another output_dir"
        )
    if checkpoint is not None and checkpoint.step > config.max_steps:
        raise ValueError(
            f"max_steps is {config.max_steps}, but {checkpoint.folder} is of step {checkpoint.step}; allowed: "
            f"{checkpoint.step} or more"
        )
    if checkpoint is not None:
        identity.require_same(checkpoint.identity, checkpoint.folder)
    return checkpoint


def _require_unfinished(config: TrainConfig) -> None:
    """Refuse to replace what a run that is done has left.

    Raises:
        ValueError: output_dir has a model or a summary, and no checkpoint that the run could go on from.
    """
    if config.output_dir is None or newest_checkpoint(checkpoints_folder(config.output_dir)) is not None:
        return
    folder = Path(config.output_dir).expanduser()
    for name in ("model", "summary.json"):
        if (folder / name).exists():
            raise ValueError(
                f"output_dir has the {name} of a run that is done, which this run would overwrite, and no checkpoint "
                "to go on from; allowed: another output_dir, or an empty one"
            )


def training_batches(run: Run) -> ShardedLoader:
    """This rank's batches, from where the run is in the data.

    Raises:
        ValueError: the checkpoint was made with other data.
    """
    loader = ShardedLoader(
        run.data.train, run.plan.topology, micro_batch_size=run.plan.micro_batch_size, seed=run.config.seed
    )
    if run.checkpoint is not None:
        loader.load_state_dict(run.checkpoint.data)
    return loader

"""The one place that puts the parts in order: what can be refused first, then the processes meet, then the weights."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import AutoModelForCausalLM, PreTrainedConfig, get_scheduler, set_seed
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from mst_ds.adapters import add_adapters, load_peft_config, model_on_meta
from mst_ds.checkpoint import (
    Checkpoint,
    Identity,
    load_checkpoint,
    newest_checkpoint,
    read_checkpoint,
    universal_setting,
)
from mst_ds.config import AUTO, TrainConfig
from mst_ds.data import ShardedLoader, TrainingData, load_training_data
from mst_ds.host_memory import host_memory
from mst_ds.jit_build import build_shared_memory_collective, unlink_shared_memory
from mst_ds.model_shape import ModelShape, load_model_config, shipped_model_config
from mst_ds.patch import apply_plan, find_parts
from mst_ds.planner import DEFAULT_RESERVE, Gpu, Plan, gpu_of_device, make_plan
from mst_ds.preflight import require_exact
from mst_ds.structure import why_own_attention
from mst_ds.topology import choose_sp_size
from mst_ds.trained import trained_shape
from mst_ds.zero import DsConfig, has_block, load_ds_config, offloads_optimizer, resolve, split_mst

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import PeftConfig
    from torch import nn

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class RanksDisagreeError(ValueError):
    """The ranks were given, or see, what does not go together. Every rank raises it."""


@dataclass(frozen=True)
class Launch:
    """Where the launcher put this process: its global and node-local rank, and how many there are of each."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Launch:
        """Read the variables of DeepSpeed's launcher or torchrun; without any, a single process.

        Raises:
            ValueError: a variable is not a number.
        """

        def read(*names: str, default: int) -> int:
            name = next((name for name in names if name in environment), None)
            if name is None:
                return default
            if not environment[name].isdecimal():
                raise ValueError(f"the environment variable {name} is {environment[name]!r}; allowed: a whole number")
            return int(environment[name])

        world_size = read("WORLD_SIZE", default=1)
        return cls(
            rank=read("RANK", default=0),
            world_size=world_size,
            local_rank=read("LOCAL_RANK", default=0),
            local_world_size=read("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=world_size),
        )


@dataclass(frozen=True)
class Run:
    """A run that has passed every check that needs neither weights nor other processes.

    `ds_config` is what DeepSpeed gets: every "auto" filled in, without the "mst" block. `planned` makes the plan again
    for the device memory of each rank. `own_attention` is the implementation that transformers loads the model with;
    None leaves that to transformers. `checkpoint` is what the run goes on from.
    """

    config: TrainConfig
    launch: Launch
    ds_config: DsConfig
    model_config: PreTrainedConfig
    peft_config: PeftConfig | None
    own_attention: str | None
    plan: Plan
    planned: Callable[..., Plan]
    data: TrainingData
    identity: Identity
    checkpoint: Checkpoint | None

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.plan.dtype]

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
    model_config = load_model_config(config.model)
    shape = ModelShape.from_config(model_config)
    raw = load_ds_config(config.ds_config)
    mst = split_mst(raw)[1]
    sp_size = choose_sp_size(
        mst.sp_size,
        world_size=launch.world_size,
        num_attention_heads=shape.num_attention_heads,
        ranks_per_node=launch.local_world_size,
    )
    resolved = resolve(
        raw,
        train=config,
        hidden_size=shape.hidden_size,
        has_accelerator=_has_accelerator(),
        dp_size=launch.world_size // sp_size,
    )
    peft_config = None if config.peft_config is None else load_peft_config(config.peft_config)
    model, adapted = model_on_meta(model_config, peft_config)
    planned = functools.partial(
        make_plan,
        trained_shape(shape, model),
        resolved,
        world_size=launch.world_size,
        seq_len=config.seq_len,
        # On the CPU no context and no communication buffers stand beside the tensors.
        reserve=DEFAULT_RESERVE if _has_accelerator() else 0,
        host_memory=_host_memory(launch),
        sp_size=sp_size,
        rank=launch.rank,
        ranks_per_node=launch.local_world_size,
        gpu=_gpu(launch),
    )
    plan = planned(device_memory=_device_memory(launch) if mst.device_memory_gib == AUTO else None)
    if plan.zero_stage == 0 and plan.dtype != "fp32":
        # DeepSpeed's optimizer for it takes a step with zero gradients first, and does not scale an fp16 loss.
        raise ValueError(
            f"the ZeRO stage is 0 in {plan.dtype}, which DeepSpeed trains wrong; allowed: 1, 2, 3, or fp32"
        )
    find_parts(adapted, plan)
    reason = why_own_attention(model)
    if config.packing == "documents" and reason is not None:
        raise ValueError(f"packing is 'documents', but {type(model).__name__} {reason}; allowed: 'none'")
    # Any other model gets the attention of its plan from apply_plan.
    own_attention = plan.attention if plan.attention != "sdpa" and reason is not None else None
    data = load_training_data(config, model_config)
    identity = Identity.of(
        model_config,
        peft_config,
        data.tokenizer,
        dtype=plan.dtype,
        zero_stage=plan.zero_stage,
        training=_kept_settings(config, plan),
    )
    checkpoint = _checkpoint(config)
    if checkpoint is not None:
        identity.require_same(checkpoint.identity, checkpoint.folder)
    run = Run(
        config=config,
        launch=launch,
        ds_config=split_mst(resolved)[0],
        model_config=model_config,
        peft_config=peft_config,
        own_attention=own_attention,
        plan=plan,
        planned=planned,
        data=data,
        identity=identity,
        checkpoint=checkpoint,
    )
    training_batches(run)
    if config.preflight:
        require_exact(model_config, plan, packed=config.packing == "documents")
    return run


def _kept_settings(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """Settings of the optimizer and of the data whose values come from a checkpoint."""
    names = ("seed", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    samples = plan.micro_batch_size * plan.gradient_accumulation_steps * plan.dp_size
    kept = {name: getattr(config, name) for name in names}
    return kept | {"learning_rate": config.peak_learning_rate, "samples of a step": samples}


def checkpoints_folder(output_dir: str | os.PathLike[str]) -> Path:
    """Where a run with this output folder keeps its checkpoints."""
    return Path(output_dir).expanduser() / "checkpoints"


def _checkpoint(config: TrainConfig) -> Checkpoint | None:
    """What the run goes on from.

    Raises:
        ValueError: it is damaged, or of a later step than the last, or the run would overwrite another's checkpoints.
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
    return checkpoint


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


def meet(run: Run) -> Run:
    """Let the processes meet, and plan again where their devices differ in memory. A collective call.

    Raises:
        RanksDisagreeError: they would go on from different checkpoints.
    """
    get_accelerator().set_device(run.launch.local_rank)
    if "MASTER_ADDR" not in os.environ:
        _stand_alone()
    build_shared_memory_collective()
    deepspeed.init_distributed(timeout=timedelta(seconds=run.config.hang_timeout))
    # When all ranks have opened each other's.
    dist.barrier()
    unlink_shared_memory(run.launch.rank)
    _require_same_checkpoint(run)
    of_ranks: list[int] = [0] * run.launch.world_size
    dist.all_gather_object(of_ranks, run.plan.device_memory)
    if len(set(of_ranks)) == 1:
        return run
    return replace(run, plan=run.planned(device_memory=of_ranks))


def _require_same_checkpoint(run: Run) -> None:
    found = [None if run.checkpoint is None else (run.checkpoint.step, str(run.checkpoint.folder))]
    steps = found * run.launch.world_size
    dist.all_gather_object(steps, found[0])
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise RanksDisagreeError(
                f"rank 0 goes on from {steps[0]}, but rank {rank} from {step}; allowed: a folder that all ranks see"
            )


def build_engine(run: Run) -> DeepSpeedEngine:
    """Build the model under its plan and hand it to DeepSpeed, after `meet`. A collective call."""
    set_seed(run.config.seed)
    model = _load_model(run)
    # Dropout must not repeat from rank to rank; the weights above must.
    set_seed((run.config.seed + run.launch.rank) % 2**32)
    apply_plan(model, run.plan)
    has_own_optimizer, has_own_schedule = (has_block(run.ds_config, name) for name in ("optimizer", "scheduler"))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        optimizer=None if has_own_optimizer else _adamw(model, run),
        lr_scheduler=None if has_own_schedule else functools.partial(_schedule, run.config),
        config=run.ds_config | universal_setting(run.checkpoint, run.launch.world_size),
    )
    _limit_waiting(run.config.hang_timeout)
    if run.checkpoint is not None:
        load_checkpoint(engine, run.checkpoint, seed=run.config.seed)
    return engine


def _limit_waiting(seconds: float) -> None:
    """A process group does not take over the timeout of the world, and DeepSpeed gives its own none."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def _stand_alone() -> None:
    """Without a launcher a run is one process: say so where DeepSpeed looks, or it would ask for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _has_accelerator() -> bool:
    return bool(get_accelerator().device_name() != "cpu")


def _device_memory(launch: Launch) -> int:
    """Bytes of this rank's device; without an accelerator the ranks of a node share its memory."""
    if _has_accelerator():
        return int(get_accelerator().total_memory(launch.local_rank))
    return host_memory() // launch.local_world_size


def _gpu(launch: Launch) -> Gpu | None:
    """Whose rates predict the time of a step; None on the CPU and for what is not known."""
    if get_accelerator().device_name() != "cuda":
        return None
    return gpu_of_device(torch.cuda.get_device_name(launch.local_rank), _device_memory(launch))


def _host_memory(launch: Launch) -> int | None:
    """Bytes of the host that this rank may use; None without an accelerator, where the host is the device."""
    if not _has_accelerator():
        return None
    # Not what is free now: that differs from rank to rank, but all have to keep the same. A quarter is for others.
    return host_memory() * 3 // 4 // launch.local_world_size


def _load_model(run: Run) -> nn.Module:
    # transformers looks for this object, by a weak reference, to build the weights sharded from the start.
    zero3 = HfDeepSpeedConfig(run.ds_config) if run.plan.zero_stage == 3 else None
    if has_weights(run.config.model):
        model = AutoModelForCausalLM.from_pretrained(
            run.config.model, dtype=run.dtype, attn_implementation=run.own_attention
        )
    else:
        model = AutoModelForCausalLM.from_config(
            run.model_config, dtype=run.dtype, attn_implementation=run.own_attention
        )
    trained: nn.Module = model if run.peft_config is None else add_adapters(model, run.peft_config)
    del zero3
    return trained.train()


def has_weights(name_or_path: str) -> bool:
    """Whether there are weights to load: a shipped config has none, a folder may, a Hugging Face id does."""
    if shipped_model_config(name_or_path) is not None:
        return False
    folder = Path(name_or_path)
    if not folder.is_dir():
        return True
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


def _adamw(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    config = run.config
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Norms and biases are not decayed. Under ZeRO-3 a shard is flat; its shape is kept beside it.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    settings: dict[str, Any] = {
        "lr": config.peak_learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    groups = [group for group in groups if group["params"]]
    if _has_accelerator() and offloads_optimizer(run.ds_config):
        return DeepSpeedCPUAdam(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def _schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return get_scheduler(config.lr_scheduler_type, optimizer, config.num_warmup_steps, config.max_steps)

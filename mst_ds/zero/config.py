"""The DeepSpeed JSON: loaded, every "auto" filled, and the settings that decide memory."""

from __future__ import annotations

import copy
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from mst_ds.config import AUTO, TrainConfig
from mst_ds.files.read_file import read_json
from mst_ds.files.shipped import existing_or_shipped_file
from mst_ds.optimizers import ADAMW, OPTIMIZERS
from mst_ds.settings import MstConfig
from mst_ds.topology import choose_sp_size, divisors
from mst_ds.zero.checks import ACCUMULATION, MICRO_BATCH, MST, TRAIN_BATCH, ZERO, block, check, stage
from mst_ds.zero.owners import BATCH_FLAGS, require_agreement
from mst_ds.zero.pinned_memory import largest_rounded_block

OffloadDevice: TypeAlias = Literal["none", "cpu", "nvme"]
DsConfig: TypeAlias = dict[str, Any]

_OFFLOAD_DEVICES = ("none", "cpu", "nvme")
# data_types.grad_accum_dtype as DeepSpeed spells it, and bytes.
_DTYPE_BYTES: Mapping[str, int] = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}
# What an optimizer keeps for each parameter, in fp32, by optimizer.type in small letters. All others keep two, as Adam.
_MOMENTS: Mapping[str, int] = {"lion": 1, "adagrad": 1}
_MOMENTS_OF_ADAM = 2
_SGD = ("sgd", "musgd")
# Their states are the step alone. A schedule of torch saves its settings, too, and takes them from there.
_DEEPSPEED_SCHEDULES = ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
# These "auto" values are DeepSpeed's own and stay.
_DEEPSPEED_AUTO = frozenset({"data_types.keep_in_fp32_modules", f"{ZERO}.zenflow.select_strategy"})
# What a schedule is told of the length of the run.
_OF_STEPS = ("scheduler.params.warmup_num_steps", "scheduler.params.total_num_steps")


@dataclass(frozen=True)
class ZeroConfig:
    """The DeepSpeed settings that decide memory. Bucket sizes and limits are in elements, as in DeepSpeed.

    dp_world_size: the ranks that ZeRO shards over. DeepSpeed sees every rank as data parallel, so this is the
    world size, also under sequence parallelism.
    optimizer_moments: values that the optimizer keeps for each trained parameter beside its master copy.
    moments_in_8_bits: whether these are of 8 bits, with a scale for each block; else they are in fp32.
    optimizer_may_leave: whether DeepSpeed has this optimizer for states that are not on the device.
    pins_parameters, pins_optimizer: whether what is offloaded lies in pinned memory of the host.
    param_buffer_count, param_buffer_size, optimizer_buffer_count: of the buffers on the way to NVMe.
    optimizer_swaps_at_once: sub-groups whose states are on their way together.
    param_max_in_cpu: parameters that stay on the host for good where the others go to NVMe.
    largest_rounded_block: bytes of pinned memory; what is larger is not rounded up to a power of two.
    nvme_least_bytes, nvme_alignment: what is smaller has no file there; of so many bytes are reads and writes.
    """

    stage: int
    dp_world_size: int
    dtype: Literal["fp32", "fp16", "bf16"]
    grad_accum_dtype_bytes: int
    param_offload: OffloadDevice
    optimizer_offload: OffloadDevice
    optimizer_moments: int
    moments_in_8_bits: bool
    optimizer_may_leave: bool
    pins_parameters: bool
    pins_optimizer: bool
    largest_rounded_block: int
    param_buffer_count: int
    param_buffer_size: int
    param_max_in_cpu: int
    optimizer_buffer_count: int
    optimizer_swaps_at_once: int
    nvme_least_bytes: int
    nvme_alignment: int
    overlap_comm: bool
    reduce_bucket_size: int
    allgather_bucket_size: int
    sub_group_size: int
    stage3_prefetch_bucket_size: int
    stage3_max_live_parameters: int
    stage3_max_reuse_distance: int
    stage3_param_persistence_threshold: int
    stage3_model_persistence_threshold: int
    micro_batch_size: int
    gradient_accumulation_steps: int

    @property
    def dtype_bytes(self) -> int:
        return _DTYPE_BYTES[self.dtype]

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's states lie on the host, where its step runs too."""
        return self.optimizer_offload != "none"


@dataclass(frozen=True)
class ResolvedConfig:
    """A DeepSpeed JSON as one model in one world is trained with it: every "auto" of DeepSpeed's filled in.

    ds_config: what DeepSpeed gets, without the "mst" block. sp_size: that of the "mst" block, or the first of those
    that "auto" may be; other_sp_sizes: the rest of these. samples_per_step: `train_batch_size`, None where it is not
    given.
    """

    ds_config: DsConfig
    zero: ZeroConfig
    mst: MstConfig
    sp_size: int
    other_sp_sizes: tuple[int, ...] = ()
    samples_per_step: int | None = None


def load_ds_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> DsConfig:
    """Reads a DeepSpeed JSON, or copies one that is already a mapping.

    Raises:
        ValueError: the file is missing or not JSON, it holds no object, a number is not finite, or one of these is
            wrong: the ZeRO stage, the "mst" block, both bf16 and fp16 enabled, batch sizes that are not positive, the
            numbers of an optimizer or a scheduler; or it asks for what is not supported, such as secondary shards (hpZ,
            MiCS), quantized collectives (ZeRO++), autocast or tensor parallelism.
    """
    if isinstance(source, Mapping):
        config: Any = copy.deepcopy(dict(source))
    else:
        config = read_json(ds_config_file(source))
    if not isinstance(config, dict):
        raise ValueError(f"the DeepSpeed config is a {type(config).__name__}; allowed: an object with DeepSpeed's keys")
    check(config)
    return config


def ds_config_file(given: str | os.PathLike[str]) -> Path:
    """The file of a DeepSpeed JSON, or the shipped one that is called so.

    Raises:
        ValueError: there is none.
    """
    return existing_or_shipped_file(given, "ds_config", "ds_configs", "DeepSpeed JSON file")


def split_mst(ds_config: Mapping[str, Any]) -> tuple[DsConfig, MstConfig]:
    """Takes the "mst" block out: what is left is DeepSpeed's. The argument stays as it is."""
    rest = copy.deepcopy(dict(ds_config))
    return rest, MstConfig.from_dict(rest.pop(MST, {}))


def read_resolved(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    train: TrainConfig,
    hidden_size: int,
    num_attention_heads: int,
    world_size: int,
    ranks_per_node: int | None,
    has_accelerator: bool,
    sp_size: int | None = None,
) -> ResolvedConfig:
    """Reads a DeepSpeed JSON and settles what it leaves open.

    Args:
        hidden_size, num_attention_heads: of the model.
        sp_size: in place of that of the "mst" block.

    Raises:
        ValueError: see `load_ds_config`, `choose_sp_size`, `resolve` and `read_zero`.
    """
    raw, mst = split_mst(load_ds_config(source))
    requested = mst.get("sp_size") if sp_size is None else sp_size
    first = choose_sp_size(
        requested, world_size=world_size, num_attention_heads=num_attention_heads, ranks_per_node=ranks_per_node
    )
    others: list[int] = []
    samples = raw.get(TRAIN_BATCH, AUTO)
    if requested == AUTO:
        others = [size for size in divisors(world_size) if size <= num_attention_heads and size != first]
        if samples != AUTO:
            # The samples of a step say how many ranks there are to each.
            of_rank = math.prod(_batch_sizes(raw, train).values())
            fitting = [size for size in (first, *others) if of_rank * world_size // size == samples]
            first, others = fitting[0] if fitting else first, []
    ds_config = resolve(
        raw, train=train, hidden_size=hidden_size, has_accelerator=has_accelerator, dp_size=world_size // first
    )
    zero = read_zero(ds_config, dp_world_size=world_size, optim=train.optim)
    return ResolvedConfig(ds_config, zero, mst, first, tuple(others), None if samples == AUTO else samples)


def _batch_sizes(ds_config: Mapping[str, Any], train: TrainConfig) -> dict[str, Any]:
    """By DeepSpeed's keys: samples of a micro-batch, and micro-batches of a step."""
    given = {key: ds_config.get(key, AUTO) for key in BATCH_FLAGS}
    return {key: getattr(train, BATCH_FLAGS[key]) or 1 if size == AUTO else size for key, size in given.items()}


def resolve(
    ds_config: Mapping[str, Any], *, train: TrainConfig, hidden_size: int, has_accelerator: bool, dp_size: int
) -> DsConfig:
    """Fills every "auto" by the Hugging Face Trainer's rules; an "mst" block passes through untouched.

    Two rules are our own: bf16 "auto" means that there is an accelerator (and no fp16), and
    `zero_force_ds_cpu_optimizer` "auto" the same, because DeepSpeed's CPU Adam takes 50 s to build.
    DeepSpeed is not told about sequence parallelism, so `train_batch_size`, which counts samples over
    `dp_size` groups of ranks, is checked here and taken out.

    What a schedule is told of the run's length stays "auto" where that is given in epochs: see `fill_steps`.

    Raises:
        ValueError: `train_batch_size` is not micro batch x accumulation x `dp_size`, "auto" has no rule, or a flag
            that was given says another number than the JSON.
    """
    require_agreement(ds_config, train)
    resolved = copy.deepcopy(dict(ds_config))
    # DeepSpeed has a default of its own, which no flag would reach.
    resolved.setdefault("gradient_clipping", AUTO)
    resolved |= _batch_sizes(resolved, train)
    _check_train_batch(resolved.pop(TRAIN_BATCH, AUTO), resolved[MICRO_BATCH], resolved[ACCUMULATION], dp_size)
    for path, value in _auto_values(resolved, train, hidden_size, has_accelerator).items():
        _fill(resolved, path, value)
    if train.num_train_epochs is None:
        resolved = fill_steps(resolved, train)
    if not has_accelerator and read_zero(resolved, dp_world_size=1).offloads_optimizer:
        # DeepSpeed would ask for its own CPU Adam, and that for a build of 50 s.
        resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    for path in _auto_paths(resolved):
        if train.num_train_epochs is not None and path in _OF_STEPS:
            continue
        if path not in _DEEPSPEED_AUTO and not path.startswith(f"{MST}."):
            raise ValueError(f"{path} is 'auto', which has no meaning there; allowed: a value, or leave the key out")
    return resolved


def fill_steps(ds_config: Mapping[str, Any], train: TrainConfig) -> DsConfig:
    """A copy with the length of the run where its schedule has "auto" for it."""
    filled = copy.deepcopy(dict(ds_config))
    # DeepSpeed rejects 0 steps of warm-up.
    for path, value in zip(_OF_STEPS, (max(1, train.num_warmup_steps), train.max_steps), strict=True):
        _fill(filled, path, value)
    return filled


def read_zero(ds_config: Mapping[str, Any], *, dp_world_size: int, optim: str = ADAMW) -> ZeroConfig:
    """Types a resolved config, with DeepSpeed's own defaults for the keys it leaves out, and what this process'
    environment says of pinned memory.

    Args:
        optim: the optimizer where the JSON has none, a name among `OPTIMIZERS`.

    Raises:
        ValueError: a setting has the wrong type, or is still "auto"; or the optimizer does not go to the host.
    """
    zero = block(ds_config, ZERO)
    zero_stage = stage(ds_config)
    dtype = _dtype(ds_config)
    overlap_comm = zero.get("overlap_comm")
    aio = block(ds_config, "aio")
    param, optimizer = (zero.get(key) or {} for key in ("offload_param", "offload_optimizer"))
    optimizer_offload = _offload(zero, "offload_optimizer", "cpu_offload") if zero_stage >= 1 else "none"
    own = None if has_block(ds_config, "optimizer") else OPTIMIZERS[optim]
    may_leave = own is None or own == OPTIMIZERS[ADAMW]
    if optimizer_offload != "none" and not may_leave:
        raise ValueError(
            f"optim is {optim!r} and {ZERO}.offload_optimizer.device is {optimizer_offload!r}, where DeepSpeed steps "
            f"by its own AdamW; allowed: {ADAMW}, or no offload_optimizer"
        )
    return ZeroConfig(
        stage=zero_stage,
        dp_world_size=dp_world_size,
        dtype=dtype,
        grad_accum_dtype_bytes=_grad_accum_dtype_bytes(ds_config, dtype),
        param_offload=_offload(zero, "offload_param", "cpu_offload_param") if zero_stage == 3 else "none",
        optimizer_offload=optimizer_offload,
        optimizer_moments=_optimizer_moments(ds_config) if own is None else own.moments,
        moments_in_8_bits=own is not None and own.in_8_bits,
        optimizer_may_leave=may_leave,
        pins_parameters=_pins(param, "offload_param"),
        pins_optimizer=_pins(optimizer, "offload_optimizer"),
        largest_rounded_block=largest_rounded_block(),
        param_buffer_count=_elements(param, "buffer_count", 5),
        param_buffer_size=_elements(param, "buffer_size", 10**8),
        param_max_in_cpu=_elements(param, "max_in_cpu", 10**9),
        optimizer_buffer_count=_elements(optimizer, "buffer_count", 4),
        optimizer_swaps_at_once=1 + sum(optimizer.get(f"pipeline_{way}") is True for way in ("read", "write")),
        # `MIN_AIO_BYTES` and `AIO_ALIGNED_BYTES` in swap_tensor/utils.py.
        nvme_least_bytes=max(2**20, _elements(aio, "block_size", 2**20, of="aio")),
        nvme_alignment=2**10 * max(1, _elements(aio, "intra_op_parallelism", 1, of="aio")),
        overlap_comm=zero_stage == 3 if overlap_comm is None else bool(overlap_comm),
        reduce_bucket_size=_elements(zero, "reduce_bucket_size", 5 * 10**8),
        allgather_bucket_size=_elements(zero, "allgather_bucket_size", 5 * 10**8),
        sub_group_size=_elements(zero, "sub_group_size", 10**9),
        stage3_prefetch_bucket_size=_elements(zero, "stage3_prefetch_bucket_size", 5 * 10**7),
        stage3_max_live_parameters=_elements(zero, "stage3_max_live_parameters", 10**9),
        stage3_max_reuse_distance=_elements(zero, "stage3_max_reuse_distance", 10**9),
        stage3_param_persistence_threshold=_elements(zero, "stage3_param_persistence_threshold", 10**5),
        stage3_model_persistence_threshold=_elements(zero, "stage3_model_persistence_threshold", sys.maxsize),
        micro_batch_size=ds_config.get(MICRO_BATCH, 1),
        gradient_accumulation_steps=ds_config.get(ACCUMULATION, 1),
    )


def has_block(ds_config: Mapping[str, Any], name: Literal["optimizer", "scheduler"]) -> bool:
    """Whether the JSON has its own optimizer or scheduler, which then takes the place of the flags'."""
    return name in ds_config


def kept_blocks(ds_config: Mapping[str, Any]) -> DsConfig:
    """What a checkpoint holds of a resolved JSON: settings of its optimizer, of torch's schedules, of fp16's scale."""
    names = ["optimizer"]
    if block(ds_config, "scheduler").get("type") not in _DEEPSPEED_SCHEDULES:
        names.append("scheduler")
    if _dtype(ds_config) == "fp16":
        names.append("fp16")
    return {name: ds_config[name] for name in names if name in ds_config}


def _dtype(config: Mapping[str, Any]) -> Literal["fp32", "fp16", "bf16"]:
    names: tuple[Literal["bf16", "fp16"], ...] = ("bf16", "fp16")
    for name in names:
        enabled = block(config, name).get("enabled", False)
        if not isinstance(enabled, bool):
            raise ValueError(f"{name}.enabled is {enabled!r}; allowed: true or false")
        if enabled:
            return name
    return "fp32"


def _grad_accum_dtype_bytes(config: Mapping[str, Any], dtype: str) -> int:
    name = block(config, "data_types").get("grad_accum_dtype") or dtype
    if not isinstance(name, str) or name not in _DTYPE_BYTES:
        raise ValueError(f"data_types.grad_accum_dtype is {name!r}; allowed: {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[name]


def _optimizer_moments(config: Mapping[str, Any]) -> int:
    """Of the optimizer block."""
    optimizer = block(config, "optimizer")
    name = optimizer.get("type")
    if not isinstance(name, str):
        raise ValueError(f"optimizer.type is {name!r}; allowed: the name of an optimizer, such as 'AdamW'")
    if name.lower() in _SGD:
        momentum = block(optimizer, "params").get("momentum", 0)
        if isinstance(momentum, bool) or not isinstance(momentum, int | float):
            raise ValueError(f"optimizer.params.momentum is {momentum!r}; allowed: a number")
        return int(momentum > 0)
    return _MOMENTS.get(name.lower(), _MOMENTS_OF_ADAM)


def _offload(zero: Mapping[str, Any], key: str, deprecated_key: str) -> OffloadDevice:
    if zero.get(deprecated_key):
        return "cpu"
    device = "none" if zero.get(key) is None else block(zero, key).get("device", "none")
    if device not in _OFFLOAD_DEVICES:
        raise ValueError(f"{ZERO}.{key}.device is {device!r}; allowed: {', '.join(_OFFLOAD_DEVICES)}")
    return cast(OffloadDevice, device)


def _pins(offload: Mapping[str, Any], name: str) -> bool:
    pins = offload.get("pin_memory", True)
    if not isinstance(pins, bool):
        raise ValueError(f"{ZERO}.{name}.pin_memory is {pins!r}; allowed: true or false")
    return pins


def _elements(found: Mapping[str, Any], key: str, default: int, *, of: str = ZERO) -> int:
    value = found.get(key, default)
    # JSON has 5e8 for what DeepSpeed reads as a whole number.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.maxsize or value != int(value):
        raise ValueError(f"{of}.{key} is {value!r}; allowed: a whole number of elements from 0 to {sys.maxsize}")
    return int(value)


def _check_train_batch(train_batch: int | str, micro_batch: int, accumulation: int, dp_size: int) -> None:
    expected = micro_batch * accumulation * dp_size
    if train_batch not in (AUTO, expected):
        raise ValueError(
            f"{TRAIN_BATCH} is {train_batch}; allowed: {expected} = {MICRO_BATCH} {micro_batch} x "
            f"{ACCUMULATION} {accumulation} x {dp_size} data-parallel groups, or leave it out"
        )


def _auto_values(
    config: Mapping[str, Any], train: TrainConfig, hidden_size: int, has_accelerator: bool
) -> dict[str, Any]:
    """Path to value, for each "auto" that has a rule (after transformers.integrations.deepspeed)."""
    return {
        "bf16.enabled": has_accelerator and block(config, "fp16").get("enabled") is not True,
        "fp16.enabled": False,
        "zero_force_ds_cpu_optimizer": has_accelerator,
        "gradient_clipping": train.max_grad_norm,
        f"{ZERO}.reduce_bucket_size": hidden_size * hidden_size,
        f"{ZERO}.stage3_prefetch_bucket_size": hidden_size * hidden_size * 9 // 10,
        f"{ZERO}.stage3_param_persistence_threshold": 10 * hidden_size,
        "optimizer.params.lr": train.peak_learning_rate,
        "optimizer.params.betas": [train.adam_beta1, train.adam_beta2],
        "optimizer.params.eps": train.adam_epsilon,
        "optimizer.params.weight_decay": train.weight_decay,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": train.peak_learning_rate,
    }


def _fill(config: DsConfig, path: str, value: Any) -> None:
    *parents, key = path.split(".")
    found: Any = config
    for parent in parents:
        found = found.get(parent)
        if not isinstance(found, dict):
            return
    if found.get(key) == AUTO:
        found[key] = value


def _auto_paths(found: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _auto_paths(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield f"{prefix}{key}"

"""What the DeepSpeed JSON says. The only module that spells DeepSpeed's key names."""

from __future__ import annotations

import copy
import difflib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from mst_ds.config import AUTO, MstConfig, TrainConfig

OffloadDevice: TypeAlias = Literal["none", "cpu", "nvme"]
DsConfig: TypeAlias = dict[str, Any]

_MST = "mst"
_ZERO = "zero_optimization"
_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_ACCUMULATION = "gradient_accumulation_steps"
_TRAIN_BATCH = "train_batch_size"
# DeepSpeed's own way to sequence parallelism, which changes over which ranks it averages gradients.
_SIZES_OF_ITS_OWN = ("sequence_parallel_size", "data_parallel_size")
# What shards or computes in another way than the plan and the exactness of training are about, and its value when off.
_UNSUPPORTED = (
    (_ZERO, "zero_hpz_partition_size", 1),
    (_ZERO, "mics_shard_size", -1),
    (_ZERO, "zero_quantized_weights", False),
    (_ZERO, "zero_quantized_nontrainable_weights", False),
    (_ZERO, "zero_quantized_gradients", False),
    ("torch_autocast", "enabled", False),
    ("amp", "enabled", False),
)
_COMMON_KEYS = (
    _MST,
    _ZERO,
    _MICRO_BATCH,
    _ACCUMULATION,
    _TRAIN_BATCH,
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "data_types",
)
_OFFLOAD_DEVICES = ("none", "cpu", "nvme")
# data_types.grad_accum_dtype as DeepSpeed spells it, and bytes.
_DTYPE_BYTES: Mapping[str, int] = {"fp32": 4, "float32": 4, "fp16": 2, "float16": 2, "bf16": 2, "bfloat16": 2}
# What an optimizer keeps for each parameter, in fp32, by optimizer.type in small letters. All others keep two, as Adam.
_MOMENTS: Mapping[str, int] = {"lion": 1, "adagrad": 1}
_MOMENTS_OF_ADAM = 2
_SGD = ("sgd", "musgd")
# These "auto" values are DeepSpeed's own and stay.
_DEEPSPEED_AUTO = frozenset({"data_types.keep_in_fp32_modules", f"{_ZERO}.zenflow.select_strategy"})


@dataclass(frozen=True)
class ZeroConfig:
    """The DeepSpeed settings that decide memory. Bucket sizes and limits are in elements, as in DeepSpeed.

    dp_world_size: the ranks that ZeRO shards over. DeepSpeed sees every rank as data parallel, so this is the
    world size, also under sequence parallelism.
    optimizer_moments: values that the optimizer keeps for each trained parameter beside its master copy.
    param_buffer_count, param_buffer_size, optimizer_buffer_count: of the buffers on the way to NVMe.
    """

    stage: int
    dp_world_size: int
    dtype: Literal["fp32", "fp16", "bf16"]
    grad_accum_dtype_bytes: int
    param_offload: OffloadDevice
    optimizer_offload: OffloadDevice
    optimizer_moments: int
    param_buffer_count: int
    param_buffer_size: int
    optimizer_buffer_count: int
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


def load_ds_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> DsConfig:
    """Reads a DeepSpeed JSON, or copies one that is already a mapping.

    Raises:
        ValueError: the file is missing or not JSON, it holds no object, or one of these is wrong: the ZeRO
            stage, the "mst" block, both bf16 and fp16 enabled, batch sizes that are not positive; or it asks for
            secondary shards (hpZ, MiCS), for quantized collectives (ZeRO++) or for autocast, which are not supported.
    """
    if isinstance(source, Mapping):
        config: Any = copy.deepcopy(dict(source))
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(f"ds_config is {str(path)!r}; allowed: an existing DeepSpeed JSON file")
        try:
            config = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from None
    if not isinstance(config, dict):
        raise ValueError(f"the DeepSpeed config is a {type(config).__name__}; allowed: an object with DeepSpeed's keys")
    _check(config)
    return config


def split_mst(ds_config: Mapping[str, Any]) -> tuple[DsConfig, MstConfig]:
    """Takes the "mst" block out: what is left is DeepSpeed's. The argument stays as it is."""
    rest = copy.deepcopy(dict(ds_config))
    return rest, MstConfig.from_dict(rest.pop(_MST, {}))


def resolve(
    ds_config: Mapping[str, Any], *, train: TrainConfig, hidden_size: int, has_accelerator: bool, dp_size: int
) -> DsConfig:
    """Fills every "auto" by the Hugging Face Trainer's rules; an "mst" block passes through untouched.

    Two rules are our own: bf16 "auto" means that there is an accelerator (and no fp16), and
    `zero_force_ds_cpu_optimizer` "auto" the same, because DeepSpeed's CPU Adam takes 50 s to build.
    DeepSpeed is not told about sequence parallelism, so `train_batch_size`, which counts samples over
    `dp_size` groups of ranks, is checked here and taken out.

    Raises:
        ValueError: `train_batch_size` is not micro batch x accumulation x `dp_size`, or "auto" has no rule.
    """
    resolved = copy.deepcopy(dict(ds_config))
    for key in (_MICRO_BATCH, _ACCUMULATION):
        if resolved.get(key, AUTO) == AUTO:
            resolved[key] = 1
    _check_train_batch(resolved.pop(_TRAIN_BATCH, AUTO), resolved[_MICRO_BATCH], resolved[_ACCUMULATION], dp_size)
    for path, value in _auto_values(resolved, train, hidden_size, has_accelerator).items():
        _fill(resolved, path, value)
    if not has_accelerator and offloads_optimizer(resolved):
        # DeepSpeed would ask for its own CPU Adam, and that for a build of 50 s.
        resolved.setdefault("zero_force_ds_cpu_optimizer", False)
    for path in _auto_paths(resolved):
        if path not in _DEEPSPEED_AUTO and not path.startswith(f"{_MST}."):
            raise ValueError(f"{path} is 'auto', which has no meaning there; allowed: a value, or leave the key out")
    return resolved


def read_zero(ds_config: Mapping[str, Any], *, dp_world_size: int) -> ZeroConfig:
    """Types a resolved config, with DeepSpeed's own defaults for the keys it leaves out.

    Raises:
        ValueError: a setting has the wrong type, or is still "auto".
    """
    zero = _block(ds_config, _ZERO)
    stage = _stage(ds_config)
    dtype = _dtype(ds_config)
    overlap_comm = zero.get("overlap_comm")
    param, optimizer = (zero.get(key) or {} for key in ("offload_param", "offload_optimizer"))
    return ZeroConfig(
        stage=stage,
        dp_world_size=dp_world_size,
        dtype=dtype,
        grad_accum_dtype_bytes=_grad_accum_dtype_bytes(ds_config, dtype),
        param_offload=_offload(zero, "offload_param", "cpu_offload_param") if stage == 3 else "none",
        optimizer_offload=_offload(zero, "offload_optimizer", "cpu_offload") if stage >= 1 else "none",
        optimizer_moments=_optimizer_moments(ds_config),
        param_buffer_count=_elements(param, "buffer_count", 5),
        param_buffer_size=_elements(param, "buffer_size", 10**8),
        optimizer_buffer_count=_elements(optimizer, "buffer_count", 4),
        overlap_comm=stage == 3 if overlap_comm is None else bool(overlap_comm),
        reduce_bucket_size=_elements(zero, "reduce_bucket_size", 5 * 10**8),
        allgather_bucket_size=_elements(zero, "allgather_bucket_size", 5 * 10**8),
        sub_group_size=_elements(zero, "sub_group_size", 10**9),
        stage3_prefetch_bucket_size=_elements(zero, "stage3_prefetch_bucket_size", 5 * 10**7),
        stage3_max_live_parameters=_elements(zero, "stage3_max_live_parameters", 10**9),
        stage3_max_reuse_distance=_elements(zero, "stage3_max_reuse_distance", 10**9),
        stage3_param_persistence_threshold=_elements(zero, "stage3_param_persistence_threshold", 10**5),
        stage3_model_persistence_threshold=_elements(zero, "stage3_model_persistence_threshold", sys.maxsize),
        micro_batch_size=ds_config.get(_MICRO_BATCH, 1),
        gradient_accumulation_steps=ds_config.get(_ACCUMULATION, 1),
    )


def has_block(ds_config: Mapping[str, Any], name: Literal["optimizer", "scheduler"]) -> bool:
    """Whether the JSON has its own optimizer or scheduler, which then takes the place of the flags'."""
    return name in ds_config


def offloads_optimizer(ds_config: Mapping[str, Any]) -> bool:
    """Whether the optimizer's states lie on the host, where its step runs too."""
    return read_zero(ds_config, dp_world_size=1).optimizer_offload != "none"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"the DeepSpeed JSON has the value {name}; allowed: a number, which JSON has no {name} for")


def _check(config: Mapping[str, Any]) -> None:
    for key in config:
        # DeepSpeed ignores a key that it does not know: a typing error would silently train without ZeRO.
        (near,) = difflib.get_close_matches(key, _COMMON_KEYS, n=1, cutoff=0.85) or (key,)
        if key not in _COMMON_KEYS and near != key:
            raise ValueError(f"the DeepSpeed JSON has the unknown key {key!r}; nearest: {near!r}")
    _stage(config)
    if _block(config, "bf16").get("enabled") is True and _block(config, "fp16").get("enabled") is True:
        raise ValueError("bf16 and fp16 are both enabled; allowed: one of them, or neither for fp32")
    for key in _SIZES_OF_ITS_OWN:
        if key in config:
            raise ValueError(f"{key} stands in the JSON; allowed: sp_size in the 'mst' block, which takes its place")
    for block, key, off in _UNSUPPORTED:
        value = _block(config, block).get(key, off)
        if value != off:
            raise ValueError(f"{block}.{key} is {value!r}; allowed: {json.dumps(off)}, or leave it out")
    for key in (_MICRO_BATCH, _ACCUMULATION, _TRAIN_BATCH):
        value = config.get(key, AUTO)
        if value != AUTO and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{key} is {value!r}; allowed: 'auto' or a whole number >= 1")
    MstConfig.from_dict(config.get(_MST, {}))


def _stage(config: Mapping[str, Any]) -> int:
    stage = _block(config, _ZERO).get("stage", 0)
    if not isinstance(stage, int) or isinstance(stage, bool) or not 0 <= stage <= 3:
        raise ValueError(f"the ZeRO stage is {stage!r}; allowed: 0, 1, 2, 3")
    return stage


def _block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    block = config.get(key, {})
    if not isinstance(block, Mapping):
        raise ValueError(f"{key} is {block!r}; allowed: an object with DeepSpeed's keys")
    return block


def _dtype(config: Mapping[str, Any]) -> Literal["fp32", "fp16", "bf16"]:
    names: tuple[Literal["bf16", "fp16"], ...] = ("bf16", "fp16")
    for name in names:
        enabled = _block(config, name).get("enabled", False)
        if not isinstance(enabled, bool):
            raise ValueError(f"{name}.enabled is {enabled!r}; allowed: true or false")
        if enabled:
            return name
    return "fp32"


def _grad_accum_dtype_bytes(config: Mapping[str, Any], dtype: str) -> int:
    name = _block(config, "data_types").get("grad_accum_dtype") or dtype
    if not isinstance(name, str) or name not in _DTYPE_BYTES:
        raise ValueError(f"data_types.grad_accum_dtype is {name!r}; allowed: {', '.join(_DTYPE_BYTES)}")
    return _DTYPE_BYTES[name]


def _optimizer_moments(config: Mapping[str, Any]) -> int:
    """Without an optimizer block it is the engine's own AdamW."""
    optimizer = _block(config, "optimizer")
    name = optimizer.get("type", "AdamW")
    if not isinstance(name, str):
        raise ValueError(f"optimizer.type is {name!r}; allowed: the name of an optimizer, such as 'AdamW'")
    if name.lower() in _SGD:
        momentum = _block(optimizer, "params").get("momentum", 0)
        if isinstance(momentum, bool) or not isinstance(momentum, int | float):
            raise ValueError(f"optimizer.params.momentum is {momentum!r}; allowed: a number")
        return int(momentum > 0)
    return _MOMENTS.get(name.lower(), _MOMENTS_OF_ADAM)


def _offload(zero: Mapping[str, Any], key: str, deprecated_key: str) -> OffloadDevice:
    if zero.get(deprecated_key):
        return "cpu"
    block = zero.get(key)
    device = "none" if block is None else _block(zero, key).get("device", "none")
    if device not in _OFFLOAD_DEVICES:
        raise ValueError(f"{_ZERO}.{key}.device is {device!r}; allowed: {', '.join(_OFFLOAD_DEVICES)}")
    return cast(OffloadDevice, device)


def _elements(zero: Mapping[str, Any], key: str, default: int) -> int:
    value = zero.get(key, default)
    # JSON has 5e8 for what DeepSpeed reads as a whole number.
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        raise ValueError(f"{_ZERO}.{key} is {value!r}; allowed: a whole number of elements >= 0")
    return int(value)


def _check_train_batch(train_batch: int | str, micro_batch: int, accumulation: int, dp_size: int) -> None:
    expected = micro_batch * accumulation * dp_size
    if train_batch not in (AUTO, expected):
        raise ValueError(
            f"{_TRAIN_BATCH} is {train_batch}; allowed: {expected} = {_MICRO_BATCH} {micro_batch} x "
            f"{_ACCUMULATION} {accumulation} x {dp_size} data-parallel groups, or leave it out"
        )


def _auto_values(
    config: Mapping[str, Any], train: TrainConfig, hidden_size: int, has_accelerator: bool
) -> dict[str, Any]:
    """Path to value, for each "auto" that has a rule (after transformers.integrations.deepspeed)."""
    return {
        "bf16.enabled": has_accelerator and _block(config, "fp16").get("enabled") is not True,
        "fp16.enabled": False,
        "zero_force_ds_cpu_optimizer": has_accelerator,
        "gradient_clipping": train.max_grad_norm,
        f"{_ZERO}.reduce_bucket_size": hidden_size * hidden_size,
        f"{_ZERO}.stage3_prefetch_bucket_size": hidden_size * hidden_size * 9 // 10,
        f"{_ZERO}.stage3_param_persistence_threshold": 10 * hidden_size,
        "optimizer.params.lr": train.peak_learning_rate,
        "optimizer.params.betas": [train.adam_beta1, train.adam_beta2],
        "optimizer.params.eps": train.adam_epsilon,
        "optimizer.params.weight_decay": train.weight_decay,
        "scheduler.params.warmup_min_lr": 0,
        "scheduler.params.warmup_max_lr": train.peak_learning_rate,
        # DeepSpeed rejects 0 steps of warm-up.
        "scheduler.params.warmup_num_steps": max(1, train.num_warmup_steps),
        "scheduler.params.total_num_steps": train.max_steps,
    }


def _fill(config: DsConfig, path: str, value: Any) -> None:
    *parents, key = path.split(".")
    block: Any = config
    for parent in parents:
        block = block.get(parent)
        if not isinstance(block, dict):
            return
    if block.get(key) == AUTO:
        block[key] = value


def _auto_paths(block: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in block.items():
        if isinstance(value, Mapping):
            yield from _auto_paths(value, f"{prefix}{key}.")
        elif value == AUTO:
            yield f"{prefix}{key}"

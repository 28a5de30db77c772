"""The keys and values of the DeepSpeed JSON that are refused on reading it, without DeepSpeed.

What only DeepSpeed can say of a JSON it is asked in `mst_ds.engine`, before processes meet.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from mst_ds.config import AUTO, MOST, MOST_RATE
from mst_ds.settings import MstConfig

MST = "mst"
ZERO = "zero_optimization"
MICRO_BATCH = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
TRAIN_BATCH = "train_batch_size"

# DeepSpeed's own ways to sequence parallelism; the first two change over which ranks it averages gradients.
_SIZES_OF_ITS_OWN = ("sequence_parallel_size", "data_parallel_size", "sequence_parallel")
# What shards or computes in another way than the plan and the exactness of training are about, and its values when off.
_UNSUPPORTED: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    (ZERO, "zero_hpz_partition_size", (1,)),
    (ZERO, "mics_shard_size", (-1,)),
    (ZERO, "zero_quantized_weights", (False,)),
    (ZERO, "zero_quantized_nontrainable_weights", (False,)),
    (ZERO, "zero_quantized_gradients", (False,)),
    # What is kept in fp32 is the model's to say.
    ("data_types", "keep_in_fp32_modules", ("auto",)),
    ("data_types", "buffer_dtype", (None,)),
    ("torch_autocast", "enabled", (False,)),
    ("amp", "enabled", (False,)),
    ("tensor_parallel", "autotp_size", (0, 1)),
    ("expert_parallel", "enabled", (False,)),
    ("hybrid_engine", "enabled", (False,)),
    ("data_efficiency", "enabled", (False,)),
    ("compile", "deepcompile", (False,)),
    ("autotuning", "enabled", (False,)),
)
# DeepSpeed reads these, and nothing of a run here uses them.
_UNUSED = ("pipeline", "weight_quantization")
# Of DeepSpeed's recompute, which a model of transformers does not use: what would be ignored without a word.
_IGNORED_RECOMPUTE = ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization")
# DeepSpeed takes these under a second name, which the plan does not read.
_OTHER_NAMES: Mapping[str, str] = {
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "model_persistence_threshold": "stage3_model_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
    "gather_16bit_weights_on_model_save": "stage3_gather_16bit_weights_on_model_save",
}
# A typing error in one of these is found without DeepSpeed, so that the planner finds it too.
_COMMON_KEYS = (
    MST,
    ZERO,
    MICRO_BATCH,
    ACCUMULATION,
    TRAIN_BATCH,
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "data_types",
)
_COMMON_ZERO_KEYS = (
    "stage",
    "offload_param",
    "offload_optimizer",
    "overlap_comm",
    "reduce_scatter",
    "contiguous_gradients",
    "reduce_bucket_size",
    "allgather_bucket_size",
    "sub_group_size",
    # Old names, which DeepSpeed reads still, and JSONs have.
    "cpu_offload_param",
    "stage3_gather_fp16_weights_on_model_save",
    *_OTHER_NAMES,
    *_OTHER_NAMES.values(),
)
# More samples than this at once, or summed, have no meaning; products with it fit into 64 bits.
_MOST_SAMPLES = 2**20
_MOST_INTEGER = 2**63 - 1


def check(config: Mapping[str, Any]) -> None:
    """Look at every key and value whose meaning needs no DeepSpeed.

    Raises:
        ValueError: in one line; see `mst_ds.zero.load_ds_config`.
    """
    _check_numbers(config)
    _check_keys("the DeepSpeed JSON", config, _COMMON_KEYS)
    _check_keys(ZERO, block(config, ZERO), _COMMON_ZERO_KEYS)
    stage(config)
    for key in ("bf16", "fp16"):
        enabled = block(config, key).get("enabled", False)
        if enabled != AUTO and not isinstance(enabled, bool):
            raise ValueError(f"{key}.enabled is {enabled!r}; allowed: 'auto', true or false")
    if block(config, "bf16").get("enabled") is True and block(config, "fp16").get("enabled") is True:
        raise ValueError("bf16 and fp16 are both enabled; allowed: one of them, or neither for fp32")
    if "bfloat16" in config:
        raise ValueError("the DeepSpeed JSON has the key 'bfloat16'; allowed: 'bf16', as DeepSpeed calls it now")
    _check_unsupported(config)
    _check_ignored(config)
    _check_names_of_zero(config)
    for key in (MICRO_BATCH, ACCUMULATION, TRAIN_BATCH):
        value = config.get(key, AUTO)
        if value != AUTO and not (_is_whole(value) and 1 <= value <= _MOST_SAMPLES):
            raise ValueError(f"{key} is {value!r}; allowed: 'auto' or a whole number from 1 to {_MOST_SAMPLES}")
    if "gradient_clipping" in config:
        _check_number("gradient_clipping", config["gradient_clipping"])
    for key in ("gradient_predivide_factor", "steps_per_print"):
        value = config.get(key)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < MOST
        ):
            raise ValueError(f"{key} is {value!r}; allowed: a number > 0, or leave it out")
    for name in ("optimizer", "scheduler"):
        _check_named(config, name)
    MstConfig.from_dict(config.get(MST, {}))


def stage(config: Mapping[str, Any]) -> int:
    """The ZeRO stage.

    Raises:
        ValueError: there is no such stage.
    """
    found = block(config, ZERO).get("stage", 0)
    if not _is_whole(found) or not 0 <= found <= 3:
        raise ValueError(f"the ZeRO stage is {found!r}; allowed: 0, 1, 2, 3")
    return int(found)


def block(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """An object of the JSON, an empty one where it has none.

    Raises:
        ValueError: it is something else.
    """
    found = config.get(key, {})
    if not isinstance(found, Mapping):
        raise ValueError(f"{key} is {found!r}; allowed: an object with DeepSpeed's keys")
    return found


def _check_keys(what: str, found: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """DeepSpeed ignores a key that it does not know: a typing error would silently train without ZeRO."""
    for key in found:
        if not isinstance(key, str):
            raise ValueError(f"{what} has the key {key!r}; allowed: text")
        (near,) = difflib.get_close_matches(key, known, n=1, cutoff=0.85) or (key,)
        if key not in known and near != key:
            raise ValueError(f"{what} has the unknown key {key!r}; nearest: {near!r}")


def _check_unsupported(config: Mapping[str, Any]) -> None:
    for key in _SIZES_OF_ITS_OWN:
        if key in config:
            raise ValueError(f"{key} stands in the JSON; allowed: sp_size in the 'mst' block, which takes its place")
    for name, key, off in _UNSUPPORTED:
        value = block(config, name).get(key, off[0])
        if value not in off:
            raise ValueError(f"{name}.{key} is {value!r}; allowed: {json.dumps(off[0])}, or leave it out")


def _check_names_of_zero(config: Mapping[str, Any]) -> None:
    for key, name in _OTHER_NAMES.items():
        if key in block(config, ZERO):
            raise ValueError(f"{ZERO} has the key {key!r}; allowed: {name!r}, as DeepSpeed's documentation has it")
    overlap = block(config, ZERO).get("overlap_comm")
    if overlap is not None and not isinstance(overlap, bool):
        raise ValueError(f"{ZERO}.overlap_comm is {overlap!r}; allowed: true or false")


def _check_ignored(config: Mapping[str, Any]) -> None:
    """What would change nothing, or the gradients."""
    for key in _IGNORED_RECOMPUTE:
        if block(config, "activation_checkpointing").get(key):
            raise ValueError(
                f"activation_checkpointing.{key} is set, but DeepSpeed's recompute is not used; allowed: recompute and "
                "offload_activations in the 'mst' block, which take its place"
            )
    for key in _UNUSED:
        if key in config:
            raise ValueError(f"{key} stands in the JSON, which training here has no use for; allowed: leave it out")
    for key, only in (("gradient_allreduce_op", "mean"), ("managed_gradient_accumulation", True)):
        value = config.get(key, only)
        if (value.lower() if isinstance(value, str) else value) != only:
            raise ValueError(f"{key} is {value!r}; allowed: {json.dumps(only)}, or leave it out")


def _check_named(config: Mapping[str, Any], name: str) -> None:
    """An optimizer or a scheduler: a type, and parameters of which the numbers make sense."""
    if name not in config:
        return
    found = block(config, name)
    if not isinstance(found.get("type"), str):
        raise ValueError(
            f"{name}.type is {found.get('type')!r}; allowed: the name of an {name}, such as "
            f"{'AdamW' if name == 'optimizer' else 'WarmupDecayLR'!r}; or leave {name} out".replace("an sch", "a sch")
        )
    for key, value in block(found, "params").items():
        path = f"{name}.params.{key}"
        if key == "betas" and value != AUTO:
            _check_betas(path, value)
        elif key in _OF_PARAMETERS:
            _OF_PARAMETERS[key](path, value)


def _check_number(path: str, value: Any, most: float = MOST) -> None:
    if isinstance(value, list | tuple) and value:  # one for each group of parameters
        for each in value:
            _check_number(path, each, most)
    elif value != AUTO and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most):
        raise ValueError(f"{path} is {value!r}; allowed: 'auto' or a number from 0 to {most:g}")


def _check_rate(path: str, value: Any) -> None:
    _check_number(path, value, MOST_RATE)
    if value == 0:
        raise ValueError(f"{path} is {value!r}, with which nothing is trained; allowed: 'auto' or a number > 0")


def _check_steps(path: str, value: Any) -> None:
    if value != AUTO and not (_is_whole(value) and 0 <= value <= _MOST_INTEGER):
        raise ValueError(f"{path} is {value!r}; allowed: 'auto' or a whole number >= 0")


def _check_betas(path: str, value: Any) -> None:
    def is_beta(beta: object) -> bool:
        return isinstance(beta, int | float) and not isinstance(beta, bool) and 0 <= beta < 1

    if not isinstance(value, list | tuple) or len(value) < 2 or not all(map(is_beta, value)):
        raise ValueError(f"{path} is {value!r}; allowed: 'auto' or two numbers from 0 up to, not including, 1")


def _check_warmup(path: str, value: Any) -> None:
    # DeepSpeed takes any other word for "log".
    if value not in ("log", "linear"):
        raise ValueError(f"{path} is {value!r}; allowed: 'log' or 'linear'")


_OF_PARAMETERS: Mapping[str, Callable[[str, Any], None]] = {
    "lr": _check_rate,
    "eps": _check_number,
    "weight_decay": _check_number,
    "momentum": _check_number,
    "warmup_min_lr": _check_number,
    "warmup_max_lr": _check_rate,
    "warmup_num_steps": _check_steps,
    "warmup_type": _check_warmup,
    "total_num_steps": _check_steps,
}


def _check_numbers(config: Mapping[str, Any]) -> None:
    for path, value in _values(config):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} is {value}; allowed: a finite number")
        if isinstance(value, int) and abs(value) > _MOST_INTEGER:
            raise ValueError(f"{path} is a number of {value.bit_length()} bits; allowed: at most 63")


def _values(found: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value with the path to it."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            yield from _values(value, f"{path}.{key}" if path else str(key))
    elif isinstance(found, list | tuple):
        for index, value in enumerate(found):
            yield from _values(value, f"{path}[{index}]")
    else:
        yield path, found


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

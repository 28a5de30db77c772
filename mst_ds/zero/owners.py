"""One value, two owners: flags that were given, beside a DeepSpeed JSON that says something else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from mst_ds.config import AUTO, TrainConfig
from mst_ds.optimizers import OPTIMIZERS
from mst_ds.zero.checks import ACCUMULATION, MICRO_BATCH, block

# The flags that fill in batch sizes of the JSON, by their keys.
BATCH_FLAGS: Mapping[str, str] = {
    MICRO_BATCH: "per_device_train_batch_size",
    ACCUMULATION: "gradient_accumulation_steps",
}

# The flags whose values an optimizer of the JSON has in place of them, by the names of its parameters.
_OF_OPTIMIZER: Mapping[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "betas": ("adam_beta1", "adam_beta2"),
    "eps": ("adam_epsilon",),
    "weight_decay": ("weight_decay",),
}
_OF_SCHEDULER: Mapping[str, tuple[str, ...]] = {
    "warmup_max_lr": ("learning_rate",),
    "warmup_num_steps": ("warmup_steps",),
    "total_num_steps": ("max_steps",),
}
# Of DeepSpeed's schedulers these have a rate of their own where their parameters name none.
_OWN_THE_RATE = ("WarmupDecayLR", "OneCycle", "LRRangeTest")


def require_agreement(ds_config: Mapping[str, Any], train: TrainConfig) -> None:
    """Make sure that each flag which the user gave has an effect.

    Raises:
        ValueError: the JSON has another number than a flag, or a block that takes the flag's place and leaves it out.
    """
    clipping = ds_config.get("gradient_clipping", AUTO)
    if "max_grad_norm" in train.given and clipping not in (AUTO, train.max_grad_norm):
        _refuse("max_grad_norm", train.max_grad_norm, "gradient_clipping", clipping)
    total = block(block(ds_config, "scheduler"), "params").get("total_num_steps", AUTO)
    if "num_train_epochs" in train.given and total != AUTO:
        _refuse("num_train_epochs", train.num_train_epochs, "scheduler.params.total_num_steps", total)
    for name, value, path, found in _claims(ds_config, train):
        if name in train.given and found not in (AUTO, value):
            _refuse(name, value, path, found)


def _claims(ds_config: Mapping[str, Any], train: TrainConfig) -> Iterator[tuple[str, Any, str, Any]]:
    """A flag, its value, and what the JSON has in place of it: where, and what, which is None where it is left out."""
    for key, name in BATCH_FLAGS.items():
        yield name, getattr(train, name), key, ds_config.get(key, AUTO)
    if "optimizer" in ds_config:
        kind = block(ds_config, "optimizer").get("type")
        is_same = isinstance(kind, str) and kind.lower() in OPTIMIZERS[train.optim].types
        yield "optim", train.optim, "optimizer.type", train.optim if is_same else kind
        params = block(block(ds_config, "optimizer"), "params")
        for key, names in _OF_OPTIMIZER.items():
            found = params.get(key)
            each = found if isinstance(found, list | tuple) and len(names) > 1 else [found] * len(names)
            for name, value in zip(names, each, strict=False):
                yield name, getattr(train, name), f"optimizer.params.{key}", value
    if "scheduler" in ds_config:
        scheduler = block(ds_config, "scheduler")
        kind, params = scheduler.get("type"), block(scheduler, "params")
        yield "lr_scheduler_type", train.lr_scheduler_type, "scheduler.type", kind
        for key, names in _OF_SCHEDULER.items():
            is_kept = key == "total_num_steps" or (key == "warmup_max_lr" and kind not in _OWN_THE_RATE)
            if key in params or not is_kept:
                yield names[0], getattr(train, names[0]), f"scheduler.params.{key}", params.get(key)


def _refuse(name: str, value: Any, path: str, found: Any) -> NoReturn:
    says = "is left out" if found is None else f"is {found!r}"
    raise ValueError(
        f"{name} is {value!r} by the flag, but {path} of the DeepSpeed JSON {says}, which would be used; allowed: the "
        f"same in both, 'auto' in the JSON, or no --{name}"
    )

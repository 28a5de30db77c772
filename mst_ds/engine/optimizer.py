"""The optimizer and the schedule of a run whose DeepSpeed JSON names none."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import get_scheduler

from mst_ds.config import TrainConfig
from mst_ds.engine.hardware import has_accelerator
from mst_ds.optimizers import ADAMW, OPTIMIZERS
from mst_ds.zero import DsConfig, ZeroConfig

if TYPE_CHECKING:
    from torch import nn


def require_installed(optim: str) -> None:
    """Make sure that this machine has what the optimizer of `--optim` is made of.

    Raises:
        ValueError: it needs bitsandbytes, which is not there.
    """
    if OPTIMIZERS[optim].in_8_bits and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"optim is {optim!r}, which needs the package bitsandbytes: install it with pip install bitsandbytes"
        )


def make_optimizer(model: nn.Module, config: TrainConfig, zero: ZeroConfig) -> torch.optim.Optimizer:
    """That of `--optim`, of what is trained; DeepSpeed's AdamW for the CPU where its states are offloaded to it."""
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
    groups = [group for group in groups if group["params"]]
    if config.optim == "sgd":
        return torch.optim.SGD(groups, lr=config.peak_learning_rate)
    settings: dict[str, Any] = {
        "lr": config.peak_learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
    }
    if OPTIMIZERS[config.optim].in_8_bits:
        from bitsandbytes.optim import AdamW8bit

        in_8_bits: torch.optim.Optimizer = AdamW8bit(groups, **settings)
        return in_8_bits
    if has_accelerator() and zero.offloads_optimizer:
        return DeepSpeedCPUAdam(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def setting_of(config: TrainConfig) -> DsConfig:
    """What DeepSpeed's JSON needs besides: it has not tested these with ZeRO, this project has."""
    return {} if OPTIMIZERS[config.optim] == OPTIMIZERS[ADAMW] else {"zero_allow_untested_optimizer": True}


def schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return get_scheduler(config.lr_scheduler_type, optimizer, config.num_warmup_steps, config.max_steps)

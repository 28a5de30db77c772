"""The optimizer and the schedule of a run whose DeepSpeed JSON names none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from transformers import get_scheduler

from mst_ds.config import TrainConfig
from mst_ds.engine.hardware import has_accelerator
from mst_ds.zero import ZeroConfig

if TYPE_CHECKING:
    from torch import nn


def adamw(model: nn.Module, config: TrainConfig, zero: ZeroConfig) -> torch.optim.Optimizer:
    """AdamW of what is trained; DeepSpeed's for the CPU where its states are offloaded to it."""
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
    if has_accelerator() and zero.offloads_optimizer:
        return DeepSpeedCPUAdam(groups, **settings)
    return torch.optim.AdamW(groups, **settings, fused=True)


def schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return get_scheduler(config.lr_scheduler_type, optimizer, config.num_warmup_steps, config.max_steps)

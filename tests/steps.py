"""Steps of the plain and the patched model in one process, and on this rank of a process group under DeepSpeed."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from plain_model import loss_and_gradients
from tiny import LEARNING_RATE, Outcome, tiny_settings
from torch import Tensor, nn

from mst_ds import apply_settings
from mst_ds.data import Batch


def alone(model: nn.Module, sequences: Sequence[Tensor]) -> dict[str, Tensor]:
    """Loss and gradients of sequences of (1, S), each by itself with the plain model, one token one weight."""
    num_items = sum(sequence.shape[1] - 1 for sequence in sequences)
    results = [
        loss_and_gradients(copy.deepcopy(model), input_ids=ids, labels=ids, num_items_in_batch=num_items)
        for ids in sequences
    ]
    return {name: sum(result[name] for result in results) for name in results[0]}


def patched_step(model: nn.Module, batch: Batch, **settings: Any) -> dict[str, Tensor]:
    """`loss_and_gradients` of a copy of `model` under a plan with these settings."""
    return loss_and_gradients(apply_settings(copy.deepcopy(model), tiny_settings(**settings)), **batch)


Optimizer = torch.optim.Optimizer
adamw = functools.partial(torch.optim.AdamW, lr=LEARNING_RATE)


def build_engine(
    model: nn.Module,
    *,
    optimizer: Optimizer | Callable[[list[nn.Parameter]], Optimizer] = adamw,
    schedule: Any = None,
    **config: Any,
) -> Any:
    """A DeepSpeed engine; `config` adds to its JSON. An optimizer that is made here has all that is trainable."""
    import deepspeed

    from mst_ds.engine.jit_build import build_shared_memory_collective

    build_shared_memory_collective()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        lr_scheduler=schedule,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,  # DeepSpeed's default clips at 1, the references do not
            "zero_allow_untested_optimizer": True,
            **config,
        },
    )
    return engine


def zero_block(stage: int, *, keep_gathered: bool = False, **settings: Any) -> dict[str, Any]:
    """The ZeRO block of a configuration. At stage 3 every parameter, also a small one, is gathered for the module that
    runs, and dropped after it, as in a model that fills its memory, unless `keep_gathered`."""
    names = "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"
    drops = {} if keep_gathered else dict.fromkeys(names, 0)
    return {"stage": stage, "stage3_param_persistence_threshold": 0, **drops, **settings}


def train(engine: Any, micro_batches: Sequence[Batch], steps: int) -> Outcome:
    """Take `steps` on this rank's shards; the gradients are those that the first step used, of what is trainable."""
    from deepspeed.utils import safe_get_full_grad

    from mst_ds.training.loop import train_step

    gradients: dict[str, Tensor] = {}
    step = engine.step

    def keep_gradients() -> None:
        if engine.is_gradient_accumulation_boundary():
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad and name not in gradients:
                    gradients[name] = safe_get_full_grad(parameter).clone()
        step()

    engine.step = keep_gradients
    losses = [train_step(engine, micro_batches).loss for _ in range(steps)]
    engine.step = step
    return Outcome(losses, gradients)

"""Steps of a patched model on shards: on simulated ranks, or on this rank of a process group under DeepSpeed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from plain_model import loss_and_gradients
from tiny import LEARNING_RATE, Outcome, tiny_settings
from torch import Tensor, nn

from mst_ds import apply_settings
from mst_ds.data import IGNORE_INDEX, Batch, shard, shift_labels
from mst_ds.sequence_parallel import SequenceGroup, run_simulated
from mst_ds.topology import Topology


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


def simulated_step(model: nn.Module, batch: Batch, sp_size: int = 2, **settings: Any) -> dict[str, Tensor]:
    """`loss_and_gradients` of the sequence on simulated ranks, each with a copy of `model`.

    Args:
        batch: see `mst_ds.data.shard`; every rank takes its part.
        settings: of the plan, see `tiny_settings`.
    """
    models = [copy.deepcopy(model) for _ in range(sp_size)]
    num_items = int((shift_labels(batch["labels"]) != IGNORE_INDEX).sum())

    def step(group: SequenceGroup) -> dict[str, Tensor]:
        topology, own = Topology(group.rank, sp_size, sp_size), models[group.rank]
        apply_settings(own, tiny_settings(topology.sp_size, **settings), sequence_group=group)
        return loss_and_gradients(own, **shard(batch, topology), num_items_in_batch=num_items)

    of_ranks = run_simulated(step, sp_size)
    names = dict.fromkeys(name for of_rank in of_ranks for name in of_rank)
    return {name: sum(of_rank.get(name, torch.zeros(())) for of_rank in of_ranks) for name in names}


def build_engine(
    model: nn.Module, *, optimizer: torch.optim.Optimizer | None = None, schedule: Any = None, **config: Any
) -> Any:
    """A DeepSpeed engine; `config` adds to its configuration. Without an optimizer AdamW has all that is trainable."""
    import deepspeed

    from mst_ds.engine.jit_build import build_shared_memory_collective

    build_shared_memory_collective()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer or torch.optim.AdamW(trainable, lr=LEARNING_RATE),
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


def zero_block(stage: int, **settings: Any) -> dict[str, Any]:
    """The ZeRO block of a configuration; at stage 3 every parameter is gathered when it is used, and dropped then."""
    everything = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0}
    return {"stage": stage, **everything, "stage3_max_live_parameters": 0, **settings}


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


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The error of each tensor in the Frobenius norm. Nothing expected is 0, or a test would see nothing."""
    assert actual.keys() == expected.keys()
    norms = {name: tensor.norm() for name, tensor in expected.items()}
    assert all(norm > 0 for norm in norms.values()), [name for name, norm in norms.items() if norm == 0]
    return {name: float((actual[name] - expected[name]).norm() / norms[name]) for name in expected}

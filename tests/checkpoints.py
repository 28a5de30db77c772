"""Small engines of DeepSpeed whose states are saved, and what is done to the checkpoints."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from steps import build_engine
from tiny import tiny_llama

from mst_ds.checkpoint import (
    STATE_FILE,
    Checkpoint,
    CheckpointWriter,
    Identity,
    universal_setting,
)
from mst_ds.checkpoint.state import checked, to_text
from mst_ds.data.tokenizer import byte_tokenizer

DATA = {"samples_seen": 7, "seed": 3}


def identity_of(config: Any, stage: int, **changes: Any) -> Identity:
    given: dict[str, Any] = {"dtype": "fp32", "zero_stage": stage, "training": {"seed": 3}}
    return Identity.of(config, None, byte_tokenizer(), **given | changes)


def two_groups(trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with weight decay for matrices alone."""
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() > 1], "weight_decay": 0.5},
        {"params": [parameter for parameter in trained if parameter.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=1e-2, fused=True)


def resumable(stage: int, checkpoint: Checkpoint | None = None, world_size: int = 1) -> dict[str, Any]:
    """For `build_engine`: an engine that is saved, or that goes on from `checkpoint` on `world_size` ranks."""
    zero = {"zero_optimization": {"stage": stage}}
    return {"optimizer": two_groups, **zero, **universal_setting(checkpoint, world_size)}


def step(engine: Any, seed: int) -> float:
    ids = torch.randint(5, 60, (1, 32), generator=torch.Generator().manual_seed(seed))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    engine.step()
    return float(loss)


def save_two(rank: int, folder: Path, stage: int) -> list[float]:
    """Steps 1 and 2 are saved; the losses of the steps that follow."""
    engine = build_engine(tiny_llama(), **resumable(stage))
    for number in (1, 2):
        step(engine, number)
        save(engine, folder, number, stage)
    return [step(engine, number) for number in (3, 4)] + draws()


def draws() -> list[float]:
    """The next number of each generator."""
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def save(engine: Any, folder: Path, number: int, stage: int, keep: int = 2) -> Path:
    identity = identity_of(engine.module.config, stage)
    writer = CheckpointWriter(folder, keep, identity, byte_tokenizer(), source="small_llama")
    return writer.save(engine, step=number, data=DATA)


def rewrite_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes `state.json` as someone does who knows of its checksum."""
    file = folder / STATE_FILE
    state = checked(json.loads(file.read_text(encoding="utf-8")))
    change(state)
    file.write_text(to_text(state), encoding="utf-8")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, (f"import os; os.mkdir({str(self.marker)!r})",))

"""Writes the model where others can read it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def export_model(engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, folder: str | os.PathLike[str]) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.

    A collective call; rank 0 writes, in the dtype the model was trained in. Under ZeRO-3 one parameter at a time is
    gathered, so no device ever holds more than its own model states and one parameter; rank 0's host holds the model.
    """
    state = _gather_parameters(engine.module)
    if dist.get_rank() == 0:
        engine.module.save_pretrained(Path(folder), state_dict=state)
        tokenizer.save_pretrained(Path(folder))


def _gather_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and persistent buffer by name, on rank 0's host; empty elsewhere. Tied ones appear once."""
    writes = dist.get_rank() == 0
    state = {}
    for name, parameter in model.named_parameters():
        # Without ZeRO-3 this context does nothing.
        with deepspeed.zero.GatheredParameters([parameter]):
            if writes:
                state[name] = parameter.detach().cpu().clone()
    if writes:
        persistent = model.state_dict().keys()
        state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    return state

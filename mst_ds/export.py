"""Writes the model where others can read it: from a run, or from a checkpoint."""

from __future__ import annotations

import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mst_ds.adapters import ADAPTER_FILE, load_peft_config, model_on_meta
from mst_ds.checkpoint import MODEL_FOLDER, STATES_FOLDER, Checkpoint, only_states, require_intact

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


def export_checkpoint(checkpoint: Checkpoint, folder: str | os.PathLike[str]) -> None:
    """Write what `export_model` writes, from a checkpoint; in one process, whose memory holds the weights in fp32."""
    require_intact(checkpoint)
    source = checkpoint.folder / MODEL_FOLDER
    peft_config = load_peft_config(str(source)) if (source / ADAPTER_FILE).is_file() else None
    base_model = None if peft_config is None else peft_config.base_model_name_or_path
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[checkpoint.identity.dtype]
    model: Any = model_on_meta(AutoConfig.from_pretrained(source), peft_config, dtype)[1]
    if peft_config is not None:
        # peft takes it from the config's own place, which has no weights.
        model.active_peft_config.base_model_name_or_path = base_model
    state = {name: tensor.to(dtype) for name, tensor in _load_weights(checkpoint).items()}
    model.save_pretrained(Path(folder), state_dict=state)
    AutoTokenizer.from_pretrained(source).save_pretrained(Path(folder))


def _load_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    if checkpoint.identity.zero_stage == 0:
        with only_states(checkpoint.folder):
            states = torch.load(checkpoint.folder / STATES_FOLDER / "mp_rank_00_model_states.pt", weights_only=True)
        weights: dict[str, torch.Tensor] = states["module"]
        return weights
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with only_states(checkpoint.folder), open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.folder), tag=STATES_FOLDER)


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

"""Writes the model where others can read it: from a run, or from a checkpoint."""

from __future__ import annotations

import copy
import os
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mst_ds.adapters import ADAPTER_FILE, load_peft_config, merge_adapters, model_on_meta, require_mergeable
from mst_ds.checkpoint import (
    EXACT_FILE,
    MODEL_FOLDER,
    STATES_FOLDER,
    Checkpoint,
    checkpoints_folder,
    exact_tensors,
    newest_checkpoint,
    only_states,
    require_intact,
)
from mst_ds.dtypes import DTYPES
from mst_ds.kept_in_fp32 import fp32_parameters, persistent_buffers
from mst_ds.model_folder.whole import REST_FILE, WholeModel
from mst_ds.model_folder.whole_adapter import adapter_of_whole
from mst_ds.model_folder.write import copy_files_of, write_files_of, write_model
from mst_ds.model_shape import language_config, load_model_config

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel

# What a checkpoint's `model/` has for an export, and a model folder has not or of its own.
_OF_CHECKPOINT = ("config.json", ADAPTER_FILE, EXACT_FILE, REST_FILE)


def export_run(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: Path,
    *,
    source: str,
    merge_adapter: bool,
    whole: WholeModel | None,
) -> None:
    """`export_model` at the end of a run, into its `model/`.

    Raises:
        OSError: it could not be written, with where the run's work is.
    """
    try:
        folder = output_dir / "model"
        export_model(engine, tokenizer, folder, source=source, merge_adapter=merge_adapter, whole=whole)
    except OSError as error:
        newest = newest_checkpoint(checkpoints_folder(output_dir))
        if newest is None:
            work = "the run made no checkpoints, so that its work is lost; --save_steps makes them"
        else:
            work = f"the run's work is in {newest.folder}, of which mst-export makes the model"
        raise OSError(f"{error}; {work}") from error


def export_model(
    engine: DeepSpeedEngine,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike[str],
    *,
    source: str,
    merge_adapter: bool = False,
    whole: WholeModel | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load; of a
    multimodal model its own class.

    A collective call; rank 0 writes, in the dtype the model was trained in, and in fp32 what is kept so. Under ZeRO-3
    one parameter at a time is gathered, so no device ever holds more than its own model states and one parameter;
    rank 0's host holds the model.

    Args:
        source: see `write_files_of`.
        merge_adapter: write the model with its adapters merged into its weights, in place of the adapters.
        whole: the multimodal model whose language model the engine has.

    Raises:
        OSError: it could not be written, on rank 0. What was in `folder` is as it was.
    """
    model: Any = engine.module
    state = _gather_parameters(model)
    if dist.get_rank() == 0:
        if merge_adapter:
            model, state = merged_state(model.config, model.active_peft_config, state)
        has_adapters = bool(getattr(model, "peft_config", None))
        is_joined = whole is not None and not has_adapters
        if whole is not None and is_joined:
            model, state = whole.joined(state)

        def write_files(partial: Path) -> None:
            write_files_of(model, tokenizer, source, partial)
            if whole is not None and has_adapters:
                adapter_of_whole(partial, whole.places, model.base_model.targeted_module_names)

        write_model(model, state, Path(folder), write_files=write_files, has_stored_names=is_joined)


def export_checkpoint(checkpoint: Checkpoint, folder: str | os.PathLike[str], *, merge_adapter: bool = False) -> None:
    """Write what `export_model` writes, from a checkpoint; in one process, whose memory holds the weights in fp32.

    Raises:
        ValueError: adapters are to be merged, and there are none, or they cannot be.
        OSError: it could not be written, or a file of the checkpoint is not as it was written.
    """
    require_intact(checkpoint)
    source = checkpoint.folder / MODEL_FOLDER
    peft_config = load_peft_config(str(source)) if (source / ADAPTER_FILE).is_file() else None
    base_model = None if peft_config is None else peft_config.base_model_name_or_path
    dtype = DTYPES[checkpoint.identity.dtype]
    whole_config = load_model_config(str(source))
    model_config, whole = language_config(whole_config), WholeModel.of_checkpoint(source, whole_config)
    if merge_adapter:
        if peft_config is None:
            raise ValueError(
                f"the checkpoint {checkpoint.folder} has no adapters to merge; allowed: no --merge_adapter"
            )
        require_mergeable(model_config, peft_config)
    model: Any = model_on_meta(model_config, peft_config, dtype)[1]
    if peft_config is not None:
        # peft takes it from the config's own place, which has no weights.
        model.active_peft_config.base_model_name_or_path = base_model
    # Tied ones once.
    names = dict(model.named_parameters()).keys()
    state = {name: tensor.to(dtype) for name, tensor in _load_weights(checkpoint).items() if name in names}
    state |= exact_tensors(checkpoint.folder)
    if merge_adapter:
        model, state = merged_state(model_config, model.active_peft_config, state)
    has_adapters = bool(getattr(model, "peft_config", None))
    is_joined = whole is not None and not has_adapters
    if whole is not None and is_joined:
        model, state = whole.joined(state)

    def write_files(partial: Path) -> None:
        shutil.copytree(source, partial, ignore=shutil.ignore_patterns(*_OF_CHECKPOINT), dirs_exist_ok=True)
        if merge_adapter and base_model:
            # A checkpoint of adapters has none of them: they are the model's.
            copy_files_of(base_model, partial)
        if whole is not None and has_adapters:
            adapter_of_whole(partial, whole.places, model.base_model.targeted_module_names)

    write_model(model, state, Path(folder), write_files=write_files, has_stored_names=is_joined)


def merged_state(
    model_config: PreTrainedConfig, peft_config: PeftConfig, state: dict[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model without adapters, and what is saved of it, by name.

    Args:
        state: of the model with its adapters; each merged tensor has the dtype that its own had.
    """
    plain = model_on_meta(copy.deepcopy(model_config), None)[0]
    adapted: Any = model_on_meta(copy.deepcopy(model_config), copy.deepcopy(peft_config))[1]
    adapted.load_state_dict(state, strict=False, assign=True)
    merged = merge_adapters(adapted)
    tensors = dict(merged.named_parameters()) | persistent_buffers(merged)
    # Of tied weights, of which `state` has one, the first name.
    names = [*(name for name, _ in plain.named_parameters()), *persistent_buffers(plain)]
    return plain, {name: tensors[name].detach() for name in names}


def _load_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    if checkpoint.identity.zero_stage == 0:
        with only_states(checkpoint.folder):
            states = torch.load(checkpoint.folder / STATES_FOLDER / "mp_rank_00_model_states.pt", weights_only=True)
        weights: dict[str, Tensor] = states["module"]
        return weights
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with only_states(checkpoint.folder), open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.folder), tag=STATES_FOLDER)


def _gather_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and persistent buffer by name, on rank 0's host; empty elsewhere. Tied ones appear once."""
    writes = dist.get_rank() == 0
    in_fp32 = fp32_parameters(model)
    state = {}
    for name, parameter in model.named_parameters():
        # Without ZeRO-3 this context does nothing.
        with deepspeed.zero.GatheredParameters([parameter]):
            if writes:
                state[name] = in_fp32.get(name, parameter).detach().cpu().clone()
    if writes:
        state |= {name: buffer.cpu() for name, buffer in persistent_buffers(model).items()}
    return state

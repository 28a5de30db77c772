"""Writes a checkpoint, atomically renamed into place when all of it is on disk."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from mst_ds.checkpoint.checksums import checksum, shared_by_ranks
from mst_ds.checkpoint.folder import (
    EXACT_FILE,
    MODEL_FOLDER,
    STATE_FILE,
    STATES_FOLDER,
    best_name,
    complete_names,
    folder_name,
    remove,
    remove_checkpoint,
    remove_unfinished,
    unfinished,
)
from mst_ds.checkpoint.identity import Identity
from mst_ds.checkpoint.random_states import random_file, random_states
from mst_ds.checkpoint.state import to_text
from mst_ds.dtypes import DTYPES
from mst_ds.files.whole_file import flush_to_disk
from mst_ds.kept_in_fp32 import fp32_parameters, persistent_buffers
from mst_ds.model_folder.write import write_files_of

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedTokenizerBase

    from mst_ds.model_folder import WholeModel


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run into `folder`, and keeps the `keep` newest.

    Attributes:
        identity, tokenizer: of the run.
        source: of the model, see `write_files_of`.
        whole: the multimodal model whose language model the run trains.
        keeps_best: one of those that are kept is the one whose evaluation has the lowest loss; beside it the newest is
            kept whatever `keep` is.
    """

    folder: Path
    keep: int
    identity: Identity
    tokenizer: PreTrainedTokenizerBase
    source: str
    whole: WholeModel | None = None
    keeps_best: bool = False

    def save(
        self, engine: DeepSpeedEngine, *, step: int, data: Mapping[str, Any], eval_loss: float | None = None
    ) -> Path:
        """Writes the checkpoint of `step`, and then removes those that are not kept. A collective call.

        Args:
            data: the place in the data.
            eval_loss: of an evaluation after `step`.

        Raises:
            OSError: a file could not be written, on the rank that raises it. Earlier checkpoints are as they were; the
                other ranks wait, so that this rank must end the job.
        """
        target = self.folder / folder_name(step)
        partial = unfinished(target)
        is_first = dist.get_rank() == 0
        if is_first:
            remove_unfinished(self.folder)
            (partial / MODEL_FOLDER).mkdir(parents=True)
        dist.barrier()
        try:
            self._write(engine, partial)
        except Exception as error:
            # torch says in a RuntimeError that a disk is full; safetensors and tokenizers have errors of their own.
            if not isinstance(error, OSError | RuntimeError) and "os error" not in str(error):
                raise
            text = f"{' '.join(str(error).split())}; {shutil.disk_usage(self.folder).free} bytes are free there"
            raise OSError(f"the checkpoint {target} could not be written: {text}") from error
        dist.barrier()
        names = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file()]
        checksums = shared_by_ranks(names, lambda name: _flush_and_checksum(partial / name))
        if is_first:
            state = {
                "step": step,
                "world_size": dist.get_world_size(),
                "identity": asdict(self.identity),
                "data": dict(data),
                "eval_loss": eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None,
                "sizes": {name: (partial / name).stat().st_size for name in names},
                "checksums": checksums,
            }
            self._finish(partial, target, state)
        dist.barrier()
        return target

    def _write(self, engine: DeepSpeedEngine, partial: Path) -> None:
        """All files but the one that says that the checkpoint is whole."""
        engine.save_checkpoint(str(partial), tag=STATES_FOLDER, save_latest=False)
        torch.save(random_states(engine.device), partial / random_file(dist.get_rank()))
        # Collective, so on every rank.
        exact = fp32_parameters(engine.module) | persistent_buffers(engine.module)
        if dist.get_rank() == 0:
            _write_model_folder(engine, self, exact, partial / MODEL_FOLDER)

    def _finish(self, partial: Path, target: Path, state: Mapping[str, Any]) -> None:
        (partial / STATE_FILE).write_text(to_text(state), encoding="utf-8")
        flush_to_disk(partial / STATE_FILE)
        if os.path.lexists(target):  # no complete one: a run goes on from the newest
            remove(target)
        partial.replace(target)
        flush_to_disk(self.folder)
        names = complete_names(self.folder)
        best = best_name(self.folder) if self.keeps_best else None
        for old in names_to_remove(names, keep=self.keep, best=best):
            remove_checkpoint(self.folder / old)


def names_to_remove(names: Sequence[str], *, keep: int, best: str | None) -> list[str]:
    """Of `names`, by step, all but the `keep` newest; `best` is one of the `keep`, and so is always the newest."""
    kept = names[-keep:]
    if best is not None and best not in kept:
        kept = [best, *names[-max(1, keep - 1) :]]
    return [name for name in names if name not in kept]


def _write_model_folder(
    engine: DeepSpeedEngine, writer: CheckpointWriter, exact: Mapping[str, Tensor], folder: Path
) -> None:
    """What an export needs beside the weights; `exact`: tensors whose dtype DeepSpeed's files may not keep."""
    model: Any = engine.module
    peft_configs = getattr(model, "peft_config", None)
    if peft_configs:
        model.active_peft_config.save_pretrained(str(folder))
    if writer.whole is None:
        model.config.save_pretrained(str(folder))
    else:
        writer.whole.config.save_pretrained(str(folder))
        writer.whole.write_rest(folder, DTYPES[writer.identity.dtype])
    write_files_of(model, writer.tokenizer, writer.source, folder)
    save_file({name: tensor.cpu().contiguous() for name, tensor in exact.items()}, folder / EXACT_FILE)


def _flush_and_checksum(path: Path) -> int:
    flush_to_disk(path)
    return checksum(path)

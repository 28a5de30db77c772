"""A run that has been checked, and its batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from mst_ds.checkpoint import Checkpoint, Identity
from mst_ds.config import TrainConfig
from mst_ds.data import EvalLoader, Loading, ShardedLoader, TrainingData
from mst_ds.dtypes import DTYPES
from mst_ds.engine.hardware import has_accelerator
from mst_ds.engine.launch import Launch
from mst_ds.model_folder import ModelLayout, SavedAdapter, Weights, WholeModel
from mst_ds.planner import Plan, Request
from mst_ds.zero import DsConfig

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Run:
    """A run that has passed every check that needs neither tokens, weights nor other processes.

    `ds_config` is what DeepSpeed gets: every "auto" filled in, without the "mst" block. `request` is what `plan` was
    made of. `stored_vocab_size` are the rows that the weights have for tokens, fewer than the model where some are
    added. `own_attention` is the implementation that transformers loads the model with; None leaves that to
    transformers. `whole` is the multimodal model whose language model is trained, None where that is all there is.
    `weights` is None where they start from random ones, `adapter` where adapters are new ones or there
    are none; `layout` is of the model that was checked, and `notes` what a user should know of what is loaded.
    `checkpoint` is what the run goes on from.
    """

    config: TrainConfig
    launch: Launch
    ds_config: DsConfig
    model_config: PreTrainedConfig
    peft_config: PeftConfig | None
    stored_vocab_size: int
    own_attention: str | None
    model_class: type[PreTrainedModel]
    layout: ModelLayout
    whole: WholeModel | None
    weights: Weights | None
    adapter: SavedAdapter | None
    notes: tuple[str, ...]
    plan: Plan
    request: Request
    tokenizer: PreTrainedTokenizerBase
    identity: Identity
    checkpoint: Checkpoint | None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.plan.dtype]

    @property
    def loading(self) -> Loading:
        """How its batches are made; pinned memory is for accelerators alone."""
        return Loading(self.config.dataloader_num_workers, self.config.dataloader_pin_memory and has_accelerator())

    @property
    def steps_done(self) -> int:
        """Optimizer steps that were taken before this run goes on."""
        return 0 if self.checkpoint is None else self.checkpoint.step


def training_batches(run: Run, data: TrainingData) -> ShardedLoader:
    """This rank's batches, from where the run is in the data.

    Raises:
        ValueError: the checkpoint was made with other data.
    """
    loader = ShardedLoader(
        data.train,
        run.plan.topology,
        micro_batch_size=run.plan.micro_batch_size,
        seed=run.config.seed,
        layer_chunks=run.plan.settings.layer_chunks,
        loading=run.loading,
    )
    if run.checkpoint is not None:
        loader.load_state_dict(run.checkpoint.data)
    return loader


def evaluation_batches(run: Run, data: TrainingData) -> EvalLoader | None:
    """This rank's batches of an evaluation; None where nothing is held out."""
    if data.held_out is None:
        return None
    return EvalLoader(
        data.held_out,
        run.plan.topology,
        micro_batch_size=run.plan.micro_batch_size,
        layer_chunks=run.plan.settings.layer_chunks,
        loading=run.loading,
    )

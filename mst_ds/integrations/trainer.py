"""A plan in transformers' Trainer, and in the trainers that are made of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mst_ds.integrations.planning import plan_of_trainer, take_mst_block, zero_stage
from mst_ds.integrations.requirements import (
    needs_whole_batches,
    require_logits_are_reduced,
    require_plannable,
    require_shardable_training,
    trainer_of_trl,
)
from mst_ds.integrations.sharded import DIGEST, count_items, deal_samples, gather_of_sequences, sum_of_sequence
from mst_ds.integrations.whole_batches import ShardedForward, count_sequences_once
from mst_ds.patching import apply_settings, find_parts
from mst_ds.planner import Plan
from mst_ds.sequence_parallel import SequenceGroup, new_sequence_group
from mst_ds.settings import Settings
from mst_ds.topology import Topology

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class MstTrainerMixin(_Trainer):
    """Before a trainer of transformers or TRL: `class MyTrainer(MstTrainerMixin, SFTTrainer)`.

    Makes the plan from the trainer's arguments and applies it to the model before anything wraps it, and to the
    reference model of a trainer that has one. With `sp_size` above 1 it also deals the samples to the data-parallel
    ranks, shards their batches, and counts labels and averages losses over all ranks: one token, one weight. DPOTrainer
    and KTOTrainer make the loss of a whole batch on every rank of a sequence, of what the ranks' shards say of it.

    Args:
        mst: what the "mst" block of a DeepSpeed JSON says, for a trainer without a JSON or with one that has no block;
            or `Settings`, which are applied as they are, without a planner.
        seq_len: tokens of the longest sequence; None: the `max_length` of the trainer's arguments, which TRL's have.
            `Settings` need none.

    Attributes:
        mst_plan: None with `Settings`, and before there is a model.
        mst_settings: what this rank executes; None before there is a model.

    Raises:
        ValueError: a plan that cannot be made or applied, or an argument beside which the result would not be exact,
            in one line with what is allowed.
    """

    mst_plan: Plan | None = None
    mst_settings: Settings | None = None
    _mst_group: SequenceGroup | None = None
    # Where sequences are sharded,
    _mst_topology: Topology | None = None
    # and where that happens inside the model, of batches of whole sequences.
    _mst_whole: ShardedForward | None = None

    def __init__(
        self, *args: Any, mst: Settings | Mapping[str, Any] | None = None, seq_len: int | None = None, **kwargs: Any
    ) -> None:
        self._mst_given = mst
        self._mst_seq_len = seq_len
        super().__init__(*args, **kwargs)
        require_logits_are_reduced(self)
        if self._mst_topology is not None:
            require_shardable_training(self, self._mst_topology.sp_size)

    def create_accelerator_and_postprocess(self) -> None:
        block = take_mst_block(self.args)
        if block is not None and self._mst_given is not None:
            raise ValueError(
                "the DeepSpeed JSON has an 'mst' block, and the trainer was given mst as well; allowed: one of them"
            )
        if block is not None:
            self._mst_given = block
        super().create_accelerator_and_postprocess()
        require_plannable(self)
        if self.model is not None:
            self._apply_mst(self.model)

    def call_model_init(self, trial: Any = None) -> Any:
        return self._apply_mst(super().call_model_init(trial))

    def _apply_mst(self, model: Any) -> Any:
        """Apply the plan, which is made for the first model, to this one."""
        # A model that is wrapped, or has a plan, is refused before anything is asked of it.
        find_parts(model, Settings())
        is_first = self.mst_settings is None
        if is_first:
            self._make_mst_settings(model)
        own_attention = model.config._attn_implementation
        self._apply_mst_settings(model)
        reference = getattr(self, "ref_model", None)
        if is_first and reference is not None:
            self._apply_mst_settings(reference)
        if hasattr(self.args, "model_init_kwargs"):
            # TRL loads a reference model with the attention that the policy has now, which is a plan's.
            self.args.model_init_kwargs = {"attn_implementation": own_attention, **(self.args.model_init_kwargs or {})}
        return model

    def _apply_mst_settings(self, model: Any) -> None:
        assert self.mst_settings is not None
        apply_settings(model, self.mst_settings, zero_stage=zero_stage(self.args), sequence_group=self._mst_group)
        if self._mst_whole is not None:
            self._mst_whole.attach(model)

    def __setattr__(self, name: str, value: Any) -> None:
        # TRL loads a reference model, or takes the one that it was given, and wraps it right afterwards.
        is_reference = name == "ref_model" and value is not None and getattr(self, name, None) is None
        if is_reference and self.mst_settings is not None:
            self._apply_mst_settings(value)
        super().__setattr__(name, value)

    def _make_mst_settings(self, model: Any) -> None:
        if isinstance(self._mst_given, Settings):
            settings = self._mst_given
        else:
            self.mst_plan = plan_of_trainer(
                model,
                self.args,
                self.accelerator,
                self._mst_given or {},
                seq_len=self._seq_len(),
                # A chosen and a rejected one.
                rows_of_sample=2 if trainer_of_trl(self) == "DPOTrainer" else 1,
            )
            settings = self.mst_plan.settings
        self.mst_settings = settings
        if settings.sp_size > 1:
            self._share_sequences(settings)

    def _share_sequences(self, settings: Settings) -> None:
        topology = Topology(self.accelerator.process_index, self.accelerator.num_processes, settings.sp_size)
        group = new_sequence_group(settings.sp_size)
        assert group is not None
        self._mst_topology, self._mst_group = topology, group
        if needs_whole_batches(self):
            self._mst_whole = ShardedForward(topology, group, layer_chunks=settings.layer_chunks)
            count_sequences_once(self.accelerator, topology)
        shard_chunks = settings.layer_chunks if self._mst_whole is None else None
        deal_samples(self.accelerator, topology, shard_chunks=shard_chunks)

    def _seq_len(self) -> int:
        seq_len: int | None = self._mst_seq_len or getattr(self.args, "max_length", None)
        if seq_len is None:
            raise ValueError("a plan needs the length of the longest sequence; allowed: seq_len=... for the trainer")
        return seq_len

    def get_total_train_batch_size(self, args: Any) -> int:
        topology = self._mst_topology
        return super().get_total_train_batch_size(args) // (1 if topology is None else topology.sp_size)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        if self._mst_topology is None or self._mst_whole is not None:
            return super()._get_num_items_in_batch(batch_samples, device)
        return count_items(self.accelerator, batch_samples, self._mst_topology, device).sum()

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        # TRL's GRPOTrainer has a list of samples here, and no shards.
        if self._mst_topology is not None:
            inputs = {name: value for name, value in inputs.items() if name != DIGEST}
        return super()._prepare_inputs(inputs)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Any, Any, Any]:
        if self._mst_topology is None:
            if not prediction_loss_only and trainer_of_trl(self) is None:
                inputs = {**inputs, "skip_logits": False}
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        if not prediction_loss_only:
            raise ValueError(
                "predictions need the logits of whole sequences, which are sharded; allowed with sp_size "
                f"{self._mst_topology.sp_size}: prediction_loss_only"
            )
        if self._mst_whole is not None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        return self._loss_of_sequences(model, inputs, self._mst_topology), None, None

    def _loss_of_sequences(self, model: Any, inputs: dict[str, Any], topology: Topology) -> Tensor:
        """What the evaluation of a trainer without shards has on the data-parallel rank of these sequences."""
        counts = count_items(self.accelerator, [inputs], topology, self.args.device)
        # transformers divides by the labels of all ranks, TRL by a rank's own.
        is_own = trainer_of_trl(self) is not None
        num_items = sum_of_sequence(counts, topology) * topology.dp_size if is_own else counts.sum()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss: Any = self.compute_loss(model, inputs, num_items_in_batch=num_items)
        # Each rank's is of its labels alone, times the number of all ranks.
        return sum_of_sequence(self.accelerator.gather(loss.detach()), topology) / topology.sp_size

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self._mst_topology is not None and self._mst_whole is None:
            self.gather_function = functools.partial(gather_of_sequences, self.accelerator, self._mst_topology)
        return super().evaluation_loop(*args, **kwargs)

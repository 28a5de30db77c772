"""Applies a plan to one model instance, and takes it off again."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mst_ds.minisequence import chunked_loss, chunked_mlp
from mst_ds.planner import Plan
from mst_ds.structure import MlpStructure, decoder_layers, find_mlps, loss_structure, require_shardable
from mst_ds.ulysses import ATTENTION_NAME, UlyssesContext, new_sequence_group, register_attention
from mst_ds.ulysses.attention import find_document_starts
from mst_ds.ulysses.backends import causal_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNDO = "_mst_undo"
_IGNORE_INDEX = -100  # transformers' and torch's default


class _Unset:
    """Stands for the old value of an attribute that an instance did not have; a deepcopy leaves a class as it is."""


@dataclass
class _Undo:
    """The instance attributes that were changed, with their old values; data only, so that a model can be copied."""

    changes: list[tuple[Any, str, Any]] = field(default_factory=list)

    def set_attribute(self, module: Any, name: str, value: Any) -> None:
        """Set an instance attribute so that the undo restores the old one, or uncovers the class's."""
        self.changes.append((module, name, module.__dict__.get(name, _Unset)))
        module.__dict__[name] = value

    def run(self) -> None:
        """Put back what was there before, the last change first."""
        for module, name, old in reversed(self.changes):
            if old is _Unset:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = old


@dataclass(frozen=True)
class ModelParts:
    """What of a model a plan replaces; `mlps` is empty where the model keeps its own."""

    layers: list[nn.Module]
    mlps: list[MlpStructure]
    decoder: nn.Module
    head: nn.Linear


def find_parts(model: PreTrainedModel, plan: Plan) -> ModelParts:
    """Find what `plan` replaces, changing nothing. A model on the meta device will do.

    Raises:
        ValueError: the model is patched already, or is built in a way for which the patched model would not be exact.
    """
    if hasattr(model, _UNDO):
        raise ValueError("the model has a plan already: call mst_ds.remove_plan(model) first")
    name = type(model).__name__
    layers = decoder_layers(model)
    if plan.recompute and not layers:
        raise ValueError(f'{name} does not support recompute: set "recompute": false in the "mst" block')
    causal_backend(plan.attention)
    if plan.sp_size > 1:
        if not model._supports_attention_backend:
            raise ValueError(
                f"{name} does not use transformers' attention interface, which sequence parallelism needs: "
                "use sp_size 1 for this model"
            )
        require_shardable(model)
    return ModelParts(layers, find_mlps(model, required=plan.mlp_chunks > 1), *loss_structure(model))


def apply_plan(
    model: PreTrainedModel, plan: Plan, *, sequence_group: dist.ProcessGroup | None = None
) -> PreTrainedModel:
    """Patch this instance so that it computes what `plan` says; no class and no other instance is touched.

    Afterwards `model(input_ids=..., labels=...).loss` is the loss as before, its logits None. With sp_size > 1 every
    rank passes its own shard, with `shift_labels` and `num_items_in_batch` in place of `labels`; the losses of the
    sequence group then add up to the sequence's loss.

    Under ZeRO-3 call it before `deepspeed.initialize`: it marks each chunked MLP as a leaf module, so that the chunk
    loop runs inside one gather.

    Args:
        sequence_group: the ranks that share a sequence; None creates them (a collective call) when sp_size > 1.

    Raises:
        ValueError: the model is patched already, or is built in a way for which the patched model would not be exact.
    """
    # Everything that can be refused is refused before anything is changed.
    parts = find_parts(model, plan)
    if plan.sp_size > 1:
        sequence_group = sequence_group or new_sequence_group(plan.topology)

    undo = _Undo()
    model.__dict__[_UNDO] = undo
    for mlp in parts.mlps:
        undo.set_attribute(mlp.module, "forward", functools.partial(_mlp_forward, mlp, plan.mlp_chunks))
        if plan.zero_stage == 3:
            _mark_as_leaf(mlp.module, undo)
    head = parts.head
    undo.set_attribute(head, "forward", functools.partial(_head_forward, head, head.forward, plan.loss_chunks))
    original = model.forward
    forward = functools.partial(_model_forward, original, parts, plan, sequence_group)
    undo.set_attribute(model, "forward", functools.update_wrapper(forward, original))
    if plan.sp_size > 1:
        register_attention()
        _use_attention(model, undo)
    if plan.recompute:
        for layer in parts.layers:
            undo.set_attribute(layer, "gradient_checkpointing", True)
            undo.set_attribute(
                layer, "_gradient_checkpointing_func", functools.partial(checkpoint, use_reentrant=False)
            )
    return model


def remove_plan(model: PreTrainedModel) -> PreTrainedModel:
    """Take the plan off again: the model computes what it computed before, bit for bit.

    Raises:
        ValueError: the model has no plan.
    """
    undo = model.__dict__.pop(_UNDO, None)
    if undo is None:
        raise ValueError("the model has no plan: mst_ds.apply_plan was not called on it")
    undo.run()
    return model


def _mark_as_leaf(module: nn.Module, undo: _Undo) -> None:
    from deepspeed.utils import set_z3_leaf_module

    before = dict(module.__dict__)
    set_z3_leaf_module(module, True)
    for name, value in module.__dict__.items():
        if before.get(name, _Unset) is not value:
            undo.changes.append((module, name, before.get(name, _Unset)))


def _use_attention(model: PreTrainedModel, undo: _Undo) -> None:
    # Configs are shared between a model's modules, and often between models: each is copied once for this instance.
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if not hasattr(config, "_attn_implementation_internal"):
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            copies[id(config)]._attn_implementation_internal = ATTENTION_NAME
        undo.set_attribute(module, "config", copies[id(config)])


def _mlp_forward(mlp: MlpStructure, chunks: int, hidden_states: Tensor) -> Tensor:
    gate, up, down = mlp.gate, mlp.up, mlp.down
    return chunked_mlp(
        hidden_states,
        gate.weight if gate is not None else None,
        up.weight,
        down.weight,
        chunks=chunks,
        activation=mlp.activation,
        gate_bias=gate.bias if gate is not None else None,
        up_bias=up.bias,
        down_bias=down.bias,
    )


def _head_forward(
    head: nn.Linear,
    original: Callable[[Tensor], Tensor],
    chunks: int,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = _IGNORE_INDEX,
) -> Tensor:
    # The loss is computed inside the head's own call: that is where ZeRO-3 gathers its weight, once.
    if labels is None:
        return original(hidden_states)
    return chunked_loss(
        hidden_states,
        head.weight,
        labels,
        chunks=chunks,
        bias=head.bias,
        ignore_index=ignore_index,
        num_items_in_batch=num_items_in_batch,
    )


def _model_forward(
    original: Callable[..., Any],
    parts: ModelParts,
    plan: Plan,
    group: dist.ProcessGroup | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    from transformers.modeling_outputs import CausalLMOutputWithPast

    positional = dict(zip(inspect.signature(original).parameters, args, strict=False)) if args else {}
    kwargs = {"input_ids": None, "attention_mask": None, **positional, **kwargs}
    labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
    num_items_in_batch = kwargs.pop("num_items_in_batch", None)
    ignore_index = kwargs.pop("ignore_index", _IGNORE_INDEX)
    return_dict = kwargs.pop("return_dict", None)
    if group is not None:
        _check_shard_arguments(labels, shift_labels, num_items_in_batch, kwargs)
        kwargs |= _shard_arguments(plan, group, kwargs)
    if labels is None and shift_labels is None:
        return original(return_dict=return_dict, **kwargs)
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    outputs = parts.decoder(**kwargs | {"use_cache": False})
    loss = parts.head(
        outputs.last_hidden_state,
        labels=shift_labels,
        num_items_in_batch=num_items_in_batch,
        ignore_index=ignore_index,
    )
    output = CausalLMOutputWithPast(
        loss=loss, hidden_states=outputs.get("hidden_states"), attentions=outputs.get("attentions")
    )
    return output.to_tuple() if return_dict is False else output


def _check_shard_arguments(
    labels: Tensor | None, shift_labels: Tensor | None, num_items_in_batch: object, kwargs: dict[str, Any]
) -> None:
    if labels is not None and shift_labels is None:
        raise ValueError(
            "with sp_size > 1 pass shift_labels in place of labels: a shard's last target is on the next rank, so "
            "labels are shifted before the sequence is sharded"
        )
    if shift_labels is not None and num_items_in_batch is None:
        raise ValueError(
            "with sp_size > 1 pass num_items_in_batch, the number of valid labels of the whole step over all ranks: "
            "one token, one weight"
        )
    if kwargs.get("past_key_values") is not None or kwargs.get("use_cache"):
        raise ValueError("a model with sp_size > 1 cannot generate: call mst_ds.remove_plan(model) first")


def _shard_arguments(plan: Plan, group: dist.ProcessGroup, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments with which a shard's forward differs: positions of the whole sequence, Ulysses' context."""
    mask = kwargs["attention_mask"]
    if mask is not None and not bool((mask == 1).all()):
        raise ValueError(
            "with sp_size > 1 attention_mask must be all ones: pad on the right with ignored labels instead"
        )
    positions = kwargs.get("position_ids")
    if positions is None:
        inputs = kwargs["input_ids"] if kwargs["input_ids"] is not None else kwargs["inputs_embeds"]
        batch, length = inputs.shape[:2]
        positions = torch.arange(length, device=inputs.device) + plan.sp_rank * length
        positions = positions.unsqueeze(0).expand(batch, -1)
        starts = None
    else:
        starts = find_document_starts(positions, group)
    return {
        "attention_mask": None,
        "position_ids": positions,
        "use_cache": False,
        "ulysses": UlyssesContext(group, plan.attention, starts),
    }

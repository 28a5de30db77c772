"""Applies a plan to one model instance, and takes it off again."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mst_ds.minisequence import KeptProjections, chunked_loss, chunked_loss_of_head, chunked_tokenwise
from mst_ds.model_forward import PatchedModel, model_forward, model_generate
from mst_ds.planner import Plan
from mst_ds.recompute import DeviceStore, HostStore, LayerRecompute
from mst_ds.structure import (
    Chunkable,
    ExpertsStructure,
    LossStructure,
    MlpStructure,
    NormStructure,
    RotaryStructure,
    TokenwiseStructure,
    decoder_layers,
    find_mlps,
    find_norms,
    find_rotary,
    loss_structure,
    require_shardable,
    why_own_attention,
)
from mst_ds.ulysses import (
    ATTENTION_NAME,
    ProcessSequenceGroup,
    SequenceGroup,
    new_sequence_group,
    register_attention,
)
from mst_ds.ulysses.backends import causal_backend

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)

_UNDO = "_mst_undo"
# Their frequencies follow from the longest position, of which a shard sees only its own part.
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})


class _Unset:
    """Stands for the old value of an attribute that an instance did not have; a deepcopy leaves a class as it is."""


@dataclass
class _Undo:
    """The instance attributes that were changed, with their old values; data only, so that a model can be copied."""

    changes: list[tuple[Any, str, Any]] = field(default_factory=list)
    hooks: list[RemovableHandle] = field(default_factory=list)

    def set_attribute(self, module: Any, name: str, value: Any) -> None:
        """Set an instance attribute so that the undo restores the old one, or uncovers the class's."""
        self.changes.append((module, name, module.__dict__.get(name, _Unset)))
        module.__dict__[name] = value

    def run(self) -> None:
        """Put back what was there before, the last change first."""
        for hook in self.hooks:
            hook.remove()
        for module, name, old in reversed(self.changes):
            if old is _Unset:
                module.__dict__.pop(name, None)
            else:
                module.__dict__[name] = old


@dataclass(frozen=True)
class ModelParts:
    """What of a model a plan replaces; `mlps` is empty where the model keeps its own."""

    layers: list[nn.Module]
    mlps: list[Chunkable]
    norms: list[NormStructure]
    rotary: list[RotaryStructure]
    loss: LossStructure


def find_parts(model: nn.Module, plan: Plan) -> ModelParts:
    """Find what `plan` replaces, changing nothing. A model on the meta device will do.

    Raises:
        ValueError: the model is patched already, or is built in a way for which the patched model would not be exact.
    """
    model = _without_adapters(model, plan)
    if hasattr(model, _UNDO):
        raise ValueError("the model has a plan already: call mst_ds.remove_plan(model) first")
    layers = decoder_layers(model)
    if plan.recompute and not layers:
        raise ValueError(
            f'{type(model).__name__} does not support recompute: set "recompute": false in the "mst" block'
        )
    causal_backend(plan.attention)
    if plan.sp_size > 1:
        require_shardable(model)
    mlps = find_mlps(model, required=plan.mlp_chunks > 1)
    # What is in an MLP is chunked with it.
    inside = {module for mlp in mlps for module in mlp.module.modules()}
    norms = [norm for norm in find_norms(model) if norm.module not in inside]
    return ModelParts(layers, mlps, norms, find_rotary(model), loss_structure(model))


def apply_plan(model: Model, plan: Plan, *, sequence_group: dist.ProcessGroup | SequenceGroup | None = None) -> Model:
    """Patch this instance so that it computes what `plan` says; no class and no other instance is touched.

    Afterwards `model(input_ids=..., labels=...).loss` is the loss as before, its logits None. With sp_size > 1 every
    rank passes its own shard, with `shift_labels` and `num_items_in_batch` in place of `labels`; the losses of the
    sequence group then add up to the sequence's loss. See `mst_ds.model_forward` for packed documents and padding.

    A model with adapters of peft (LoRA) is patched below them, and returned as it was given.

    Under ZeRO-3 call it before `deepspeed.initialize`: it marks each chunked MLP as a leaf module, so that the chunk
    loop runs inside one gather.

    Args:
        sequence_group: the ranks that share a sequence; None creates them when sp_size > 1. Among processes both are
            collective calls: plans are compared.

    Raises:
        ValueError: the model is patched already, or is built in a way for which the patched model would not be exact;
            or ranks of a sequence have plans under which they would wait for each other.
    """
    # Everything that can be refused is refused before anything is changed.
    parts = find_parts(model, plan)
    base = _without_adapters(model, plan)
    group = _sequence_group(plan, sequence_group)
    if isinstance(group, ProcessSequenceGroup):
        _require_agreement(plan, group)
    undo = _Undo()
    base.__dict__[_UNDO] = undo
    store = HostStore() if plan.offload_activations else DeviceStore()
    recompute = LayerRecompute(keep_attention=plan.keep_attention, store=store)
    for mlp in parts.mlps:
        _chunk_mlp(mlp, plan, recompute, undo)
    for norm in parts.norms:
        undo.set_attribute(norm.module, "forward", functools.partial(_norm_forward, norm, norm.module.forward))
    for rotary in parts.rotary:
        undo.set_attribute(rotary.module, "forward", rotary.forward())
    _chunk_head(parts.loss, plan, undo)
    if plan.zero_stage == 3:
        for module in (*parts.layers, parts.loss.head):
            undo.hooks.append(module.register_forward_pre_hook(_require_input_gradient))
    reason = why_own_attention(base)
    configs = _use_attention(base, undo) if reason is None else []
    if group is not None:
        _share_longest_position(base, group, undo)
    patched = PatchedModel(base, parts.mlps, parts.loss, plan, group, recompute, configs, reason)
    forward = functools.partial(model_forward, base.forward, patched)
    undo.set_attribute(base, "forward", functools.update_wrapper(forward, base.forward))
    generate: Any = getattr(base, "generate", None)
    if generate is not None:
        undo.set_attribute(base, "generate", functools.partial(model_generate, generate, patched))
    if plan.recompute:
        for layer in parts.layers:
            undo.set_attribute(layer, "gradient_checkpointing", True)
            undo.set_attribute(layer, "_gradient_checkpointing_func", recompute.run_layer)
    return model


def remove_plan(model: Model) -> Model:
    """Take the plan off again: the model computes what it computed before, bit for bit.

    Raises:
        ValueError: the model has no plan.
    """
    undo = _base_model(model).__dict__.pop(_UNDO, None)
    if undo is None:
        raise ValueError("the model has no plan: mst_ds.apply_plan was not called on it")
    undo.run()
    return model


def _base_model(model: Any) -> Any:
    """The model itself, or the one that peft has wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _without_adapters(model: Any, plan: Plan) -> PreTrainedModel:
    base: PreTrainedModel = _base_model(model)
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(adapter, "alora_invocation_tokens", None) for adapter in adapters):
        raise ValueError(
            "an activated LoRA adapts the tokens after its invocation, which chunks and shards do not see: use a LoRA "
            "without alora_invocation_tokens"
        )
    if base is not model:
        _check_tuner(model, plan)
    return base


def _check_tuner(model: Any, plan: Plan) -> None:
    from peft.tuners.tuners_utils import BaseTuner

    if not model.active_peft_config.is_prompt_learning:
        if type(model.base_model).forward is not BaseTuner.forward:
            raise ValueError(
                f"{type(model.base_model).__name__} does more than adapt layers, such as add to the loss: use adapters "
                "that do not, such as LoRA"
            )
    elif plan.sp_size > 1:
        raise ValueError(
            "an adapter that learns a prompt puts it before the sequence, of which a shard is a part: use sp_size 1"
        )


def _sequence_group(plan: Plan, given: dist.ProcessGroup | SequenceGroup | None) -> SequenceGroup | None:
    if plan.sp_size == 1:
        return None
    if given is None:
        return new_sequence_group(plan.topology)
    return ProcessSequenceGroup(given) if isinstance(given, dist.ProcessGroup) else given


def _require_agreement(plan: Plan, group: ProcessSequenceGroup) -> None:
    """Refuse plans under which the ranks of a sequence would exchange different things, and wait for each other."""
    values = {name: getattr(plan, name) for name in ("recompute", "keep_attention", "head_groups")}
    mine = torch.tensor([int(value) for value in values.values()])
    if dist.get_backend(group.process_group) != "gloo":
        mine = mine.to(torch.accelerator.current_accelerator())
    for rank, theirs in enumerate(group.all_gather(mine)):
        for (name, value), other in zip(values.items(), theirs.tolist(), strict=True):
            if int(value) != other:
                raise ValueError(
                    f"{name} is {value} on rank {group.rank} of the sequence group and {type(value)(other)} on rank "
                    f'{rank}, which would wait for each other: set {name} in the "mst" block'
                )


def _chunk_mlp(mlp: Chunkable, plan: Plan, recompute: LayerRecompute, undo: _Undo) -> None:
    if isinstance(mlp, MlpStructure):
        chunked: Callable[..., Tensor] = functools.partial(_mlp_forward, mlp, recompute, plan.keep_mlp)
    elif isinstance(mlp, ExpertsStructure):
        chunked = functools.partial(_experts_forward, mlp, recompute)
    else:
        chunked = functools.partial(_tokenwise_forward, mlp, recompute)
    undo.set_attribute(mlp.module, "forward", functools.partial(chunked, mlp.module.forward, plan.mlp_chunks))
    if plan.zero_stage == 3:
        _mark_as_leaf(mlp.module, undo)


def _chunk_head(loss: LossStructure, plan: Plan, undo: _Undo) -> None:
    head = loss.head
    undo.set_attribute(head, "forward", functools.partial(_head_forward, loss, head.forward, plan.loss_chunks))
    if plan.zero_stage == 3 and not loss.is_linear:
        _mark_as_leaf(head, undo)


def _mark_as_leaf(module: nn.Module, undo: _Undo) -> None:
    from deepspeed.utils import set_z3_leaf_module

    before = dict(module.__dict__)
    set_z3_leaf_module(module, True)
    for name, value in module.__dict__.items():
        if before.get(name, _Unset) is not value:
            undo.changes.append((module, name, before.get(name, _Unset)))


def _require_input_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """DeepSpeed reduces a leaf module's gradients once its inputs have theirs: too early, if these need none."""
    hidden_states, *others = inputs
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return inputs
    if any(parameter.requires_grad for parameter in module.parameters()):
        hidden_states = hidden_states.detach().requires_grad_()
    return hidden_states, *others


def _use_attention(model: PreTrainedModel, undo: _Undo) -> list[tuple[Any, str]]:
    """Name this project's attention in this instance's configs; return them with what they named before."""
    register_attention()
    # Configs are shared between a model's modules, and often between models: each is copied once for this instance.
    copies: dict[int, tuple[Any, str]] = {}
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if not hasattr(config, "_attn_implementation_internal"):
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config), config._attn_implementation_internal
            copies[id(config)][0]._attn_implementation_internal = ATTENTION_NAME
        undo.set_attribute(module, "config", copies[id(config)][0])
    return list(copies.values())


def _share_longest_position(model: nn.Module, group: SequenceGroup, undo: _Undo) -> None:
    """Let rotary embeddings that depend on the sequence's length see its longest position on every shard."""
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        if _LENGTH_DEPENDENT_ROPE.intersection(types):
            undo.set_attribute(module, "forward", functools.partial(_rotary_forward, module.forward, group))


def _rotary_forward(
    original: Callable[..., tuple[Tensor, ...]],
    group: SequenceGroup,
    x: Tensor,
    position_ids: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, ...]:
    longest = torch.stack(group.all_gather(position_ids.max())).max()
    extended = torch.cat([position_ids, longest.expand(len(position_ids), 1)], dim=1)
    return tuple(tensor[:, :-1] for tensor in original(x, extended, *args, **kwargs))


def _mlp_forward(
    mlp: MlpStructure,
    recompute: LayerRecompute,
    keep: bool,
    original: Callable[..., Tensor],
    chunks: int,
    *args: Tensor,
    **kwargs: Tensor,
) -> Tensor:
    (hidden_states,) = _inputs(mlp.module, original, 1, args, kwargs)
    call = recompute.call
    if call is None:
        return mlp.run(chunks, hidden_states, keep=keep)
    store = call.store
    kept = call.note(lambda: KeptProjections(store.keep)) if keep else False
    return mlp.run(chunks, hidden_states, keep=kept, is_recomputing=call.is_recomputing)


def _experts_forward(
    experts: ExpertsStructure,
    recompute: LayerRecompute,
    original: Callable[..., Tensor],
    chunks: int,
    *args: Tensor,
    **kwargs: Tensor,
) -> Tensor:
    inputs = _inputs(experts.module, original, 3, args, kwargs)
    return experts.run(chunks, *inputs, is_recomputing=recompute.is_recomputing)


def _norm_forward(norm: NormStructure, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # With more than the tensor that it was tried with, such as a gate, it may do something else.
    if len(args) != 1 or kwargs:
        return original(*args, **kwargs)
    return norm.run(*args)


def _tokenwise_forward(
    tokenwise: TokenwiseStructure,
    recompute: LayerRecompute,
    original: Callable[..., Tensor],
    chunks: int,
    *args: Tensor,
    **kwargs: Tensor,
) -> Tensor:
    module = tokenwise.module
    inputs = _inputs(module, original, tokenwise.num_inputs, args, kwargs)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return chunked_tokenwise(original, inputs, trained, chunks=chunks, is_recomputing=recompute.is_recomputing)


def _inputs(
    module: nn.Module, original: Callable[..., Tensor], count: int, args: Sequence[Tensor], kwargs: dict[str, Tensor]
) -> Sequence[Tensor]:
    bound = inspect.signature(original).bind(*args, **kwargs)
    if len(bound.args) != count or bound.kwargs:
        raise ValueError(
            f"{type(module).__name__} is called with arguments with which mst_ds has not seen it work token by token: "
            f"{', '.join(bound.arguments)}"
        )
    return bound.args


def _head_forward(
    loss: LossStructure,
    original: Callable[[Tensor], Tensor],
    chunks: int,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    **arguments: Any,
) -> Tensor:
    # The loss is computed inside the head's own call: that is where ZeRO-3 gathers its weight, once.
    if labels is None:
        return original(hidden_states)
    arguments |= {"chunks": chunks, "logit_scale": loss.logit_scale, "logit_softcap": loss.logit_softcap}
    head: Any = loss.head
    if loss.is_linear:
        return chunked_loss(hidden_states, head.weight, labels, bias=head.bias, **arguments)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return chunked_loss_of_head(original, hidden_states, trained, labels, **arguments)

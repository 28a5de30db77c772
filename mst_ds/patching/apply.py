"""Applies a plan to one model instance, and takes it off again."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from mst_ds.attention import prepare_attention
from mst_ds.eager_attention import EAGER_ATTENTION_NAME, EagerAttention, register_eager_attention
from mst_ds.layer_stream import LayerStream
from mst_ds.model_shape import language_config
from mst_ds.patching.adapters import base_model, without_adapters
from mst_ds.patching.causal_lm import causal_lm_forward, generate
from mst_ds.patching.decoder import decoder_forward, known_arguments
from mst_ds.patching.guards import keep_recompute, require_outermost, require_unwrapped
from mst_ds.patching.operators import (
    attend_eagerly,
    chunk_head,
    chunk_mlp,
    chunk_norm,
    mark_as_leaf,
    mix_documents,
    pick_in_documents,
    require_input_gradient,
    stream_layer,
)
from mst_ds.patching.patched import OwnConfig, PatchedModel
from mst_ds.patching.undo import Undo
from mst_ds.planner import Plan
from mst_ds.recompute import DeviceStore, HostStore
from mst_ds.sequence_parallel import (
    ATTENTION_NAME,
    STREAM_OF_MODULE,
    ProcessSequenceGroup,
    SequenceGroup,
    new_sequence_group,
    register_attention,
)
from mst_ds.settings import KNOBS, Settings
from mst_ds.structure import (
    Chunkable,
    DocumentLengths,
    DocumentRotary,
    IndexerStructure,
    LossStructure,
    Mixer,
    NormStructure,
    RotaryStructure,
    begins_with_each_document,
    decoder_layers,
    find_document_rotary,
    find_eager_attention,
    find_indexers,
    find_mixers,
    find_mlps,
    find_norms,
    find_rotary,
    loss_structure,
    require_shardable,
    why_own_attention,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound=nn.Module)

_UNDO = "_mst_undo"


@dataclass(frozen=True)
class ModelParts:
    """What of a model a plan replaces; `mlps`, `mixers`, `indexers` and `eager` are empty where it keeps its own."""

    layers: list[nn.Module]
    mlps: list[Chunkable]
    norms: list[NormStructure]
    mixers: list[Mixer]
    eager: list[EagerAttention]
    indexers: list[IndexerStructure]
    rotary: list[RotaryStructure]
    document_rotary: list[DocumentRotary]
    loss: LossStructure


def find_parts(model: nn.Module, settings: Settings) -> ModelParts:
    """Find what a plan with these settings replaces, changing nothing. A model on the meta device will do.

    Raises:
        ValueError: the model is patched already, or is built in a way for which the patched model would not be exact.
    """
    model = without_adapters(model, settings)
    if hasattr(model, _UNDO):
        raise ValueError("the model has a plan already: call mst_ds.remove_plan(model) first")
    require_unwrapped(model)
    _require_language_model(model)
    layers = decoder_layers(model)
    if settings.recompute and not layers:
        raise ValueError(
            f'{type(model).__name__} does not support recompute: set "recompute": false in the "mst" block'
        )
    prepare_attention(settings.attention)
    if settings.sp_size > 1:
        require_shardable(model)
    mlps = find_mlps(model, required=settings.mlp_chunks > 1)
    # What is in an MLP is chunked with it.
    inside = {module for mlp in mlps for module in mlp.module.modules()}
    norms = [norm for norm in find_norms(model) if norm.module not in inside]
    keeps_own = why_own_attention(model) is not None
    mixers = [] if keeps_own else find_mixers(model)
    indexers = [] if keeps_own else find_indexers(model)
    eager = [] if keeps_own else find_eager_attention(model)
    whole = [mixer.module for mixer in mixers if not mixer.carries] + [indexer.module for indexer in indexers]
    _require_one_chunk(model, whole, settings)
    rotary, document_rotary = find_rotary(model), find_document_rotary(model)
    loss = loss_structure(model)
    return ModelParts(layers, mlps, norms, mixers, eager, indexers, rotary, document_rotary, loss)


def apply_plan(model: Model, plan: Plan, *, sequence_group: dist.ProcessGroup | SequenceGroup | None = None) -> Model:
    """Patch this instance so that it computes what `plan` says; no class and no other instance is touched.

    Afterwards `model(input_ids=..., labels=...).loss` is the loss as before, its logits None. With sp_size > 1 every
    rank passes its own shard, with `shift_labels` and `num_items_in_batch` in place of `labels`; the losses of the
    sequence group then add up to the sequence's loss. See `mst_ds.patching.decoder` for packed documents and padding.

    A model with adapters of peft (LoRA) is patched below them, and returned as it was given. Under ZeRO-3 call it
    before `deepspeed.initialize`.

    Args:
        sequence_group: the ranks that share a sequence; None creates them when sp_size > 1. Among processes both are
            collective calls: plans are compared.

    Raises:
        ValueError: see `apply_settings`; or the plan is another rank's.
    """
    if plan.sp_size > 1 and sequence_group is None and dist.is_initialized():
        place, topology = (dist.get_rank(), dist.get_world_size()), plan.topology
        if place != (topology.rank, topology.world_size):
            raise ValueError(
                f"the plan is for rank {topology.rank} of {topology.world_size}, this process is rank {place[0]} of "
                f"{place[1]}: call make_plan with this world_size and rank"
            )
    return apply_settings(model, plan.settings, zero_stage=plan.zero_stage, sequence_group=sequence_group)


def apply_settings(
    model: Model,
    settings: Settings,
    *,
    zero_stage: int = 0,
    sequence_group: dist.ProcessGroup | SequenceGroup | None = None,
) -> Model:
    """`apply_plan` without a planner: the settings are the caller's.

    Args:
        zero_stage: at 3 each chunked MLP or streamed layer is a leaf module, so that the loop over chunks runs inside
            one gather. A model that ZeRO-3 shards must say so here: its weights would not be there.

    Raises:
        ValueError: the model is patched already, or is built in a way for which the patched model would not be exact;
            or ranks of a sequence have settings under which they would wait for each other.
    """
    # Everything that can be refused is refused before anything is changed.
    parts = find_parts(model, settings)
    base = base_model(model)
    group = _sequence_group(settings, sequence_group)
    if isinstance(group, ProcessSequenceGroup):
        _require_agreement(settings, group)
    undo = Undo()
    base.__dict__[_UNDO] = undo
    reason = why_own_attention(base)
    # A layer whose tokens meet elsewhere than in this project's attention is a stream of one chunk.
    can_stream = reason is None and not parts.indexers and all(mixer.carries for mixer in parts.mixers)
    stream = _replace_parts(parts, settings, settings.layer_chunks if can_stream else 1, undo)
    if zero_stage == 3:
        _gather_leaves(parts, settings, undo)
    name = EAGER_ATTENTION_NAME if parts.eager else ATTENTION_NAME
    configs = _use_attention(base, name, stream, undo) if reason is None else []
    lengths = DocumentLengths()
    for of_documents in parts.document_rotary:
        by_document = functools.partial(of_documents.forward, lengths, of_documents.module.forward)
        undo.set_attribute(of_documents.module, "forward", by_document)
    forwards = [(module, module.__dict__[name]) for module, name, _ in undo.changes if name == "forward"]
    keep_recompute([base, parts.loss.decoder], parts.layers, settings, undo)
    patched = PatchedModel(
        model=base,
        mlps=parts.mlps,
        loss=parts.loss,
        layers=parts.layers,
        settings=settings,
        group=group,
        stream=stream,
        forwards=forwards,
        configs=configs,
        why_own_attention=reason,
        arguments=known_arguments(base.forward, parts.loss.decoder.forward),
        begins_with_each_document=begins_with_each_document(base, parts.mixers),
        document_lengths=lengths if parts.document_rotary else None,
        decoder_arguments=known_arguments(parts.loss.decoder.forward),
        asked_for_router_logits=bool(getattr(base.config, "output_router_logits", False)),
    )
    _replace_model(patched, undo)
    return model


def _require_language_model(model: PreTrainedModel) -> None:
    """Images and sounds are embedded, and masked, in ways that a plan does not know."""
    if language_config(model.config) is not model.config:
        raise ValueError(
            f"{type(model).__name__} is multimodal; allowed: its language model alone, as the class that transformers "
            "has for its text config, which mst-train makes of its folder"
        )


def _require_one_chunk(model: PreTrainedModel, whole: Sequence[nn.Module], settings: Settings) -> None:
    """
    Args:
        whole: that work on consecutive tokens of a shard: indexers, and some mixers.
    """
    if whole and settings.sp_size > 1 and settings.layer_chunks > 1:
        raise ValueError(
            f"layer_chunks is {settings.layer_chunks}, and {type(model).__name__} has {type(whole[0]).__name__}, "
            f'which works on a shard whole; allowed: "layer_chunks": 1 in the "mst" block'
        )


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that returns the last hidden states, below adapters of peft: with a plan the one that it has found."""
    base = base_model(model)
    undo: Undo | None = base.__dict__.get(_UNDO)
    decoder: nn.Module = base.base_model if undo is None else undo.outermost[0][0]
    return decoder


def remove_plan(model: Model) -> Model:
    """Take the plan off again: the model computes what it computed before, bit for bit.

    Raises:
        ValueError: the model has no plan, or its forward was wrapped since, and would lose that.
    """
    base = base_model(model)
    undo: Undo | None = base.__dict__.get(_UNDO)
    if undo is None:
        raise ValueError("the model has no plan: mst_ds.apply_plan was not called on it")
    require_outermost(undo)
    del base.__dict__[_UNDO]
    undo.run()
    return model


def _replace_parts(parts: ModelParts, settings: Settings, layer_chunks: int, undo: Undo) -> LayerStream:
    """Give the modules inside the model their forwards, which look at the layer that runs."""
    store = HostStore() if settings.offload_activations else DeviceStore()
    stream = LayerStream(chunks=layer_chunks, keep_attention=settings.keep_attention, store=store)
    for mlp in parts.mlps:
        chunk_mlp(mlp, settings, stream, undo)
    for norm in parts.norms:
        chunk_norm(norm, stream, undo)
    if settings.recompute:
        for layer in parts.layers:
            stream_layer(layer, stream, undo)
    for mixer in parts.mixers:
        mix_documents(mixer, stream, undo)
    for rotary in parts.rotary:
        undo.set_attribute(rotary.module, "forward", rotary.forward())
    # Around the forward of a rotary embedding, which is the module's own.
    for attention in parts.eager:
        attend_eagerly(attention, stream, undo)
    for indexer in parts.indexers:
        pick_in_documents(indexer, stream, undo)
    chunk_head(parts.loss, settings, undo)
    return stream


def _gather_leaves(parts: ModelParts, settings: Settings, undo: Undo) -> None:
    """The loop over a layer's chunks runs inside one gather; without recompute that over an MLP's, or an
    indexer's blocks."""
    inside = [part.module for part in (*parts.mlps, *parts.indexers)]
    for module in parts.layers if settings.recompute else inside:
        mark_as_leaf(module, undo)
    if not parts.loss.is_linear:
        mark_as_leaf(parts.loss.head, undo)
    for module in (*parts.layers, parts.loss.head):
        undo.hooks.append(module.register_forward_pre_hook(require_input_gradient))


def _replace_model(patched: PatchedModel, undo: Undo) -> None:
    """Give the decoder and the model their forwards; they are outermost."""
    base: Any = patched.model
    for module, forward in ((patched.loss.decoder, decoder_forward), (base, causal_lm_forward)):
        planned = functools.partial(forward, module.forward, patched)
        undo.set_attribute(module, "forward", functools.update_wrapper(planned, module.forward))
        undo.outermost.append((module, planned))
    own_generate = getattr(base, "generate", None)
    if own_generate is not None:
        undo.set_attribute(base, "generate", functools.partial(generate, own_generate, patched))


def _sequence_group(settings: Settings, given: dist.ProcessGroup | SequenceGroup | None) -> SequenceGroup | None:
    if settings.sp_size == 1:
        return None
    if given is None:
        return new_sequence_group(settings.sp_size)
    return ProcessSequenceGroup(given) if isinstance(given, dist.ProcessGroup) else given


def _require_agreement(settings: Settings, group: ProcessSequenceGroup) -> None:
    """Refuse settings under which the ranks of a sequence would exchange different things, and wait for each other."""
    values = {name: getattr(settings, name) for name, knob in KNOBS.items() if knob.ranks_agree}
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


def _use_attention(model: PreTrainedModel, name: str, stream: LayerStream, undo: Undo) -> list[OwnConfig]:
    """Name this project's attention in this instance's configs, and return these."""
    register_attention()
    register_eager_attention()
    # Configs are shared between a model's modules, and often between models: each is copied once for this instance.
    copies: dict[int, Any] = {}
    own_configs = []
    for module in model.modules():
        config: Any = module.__dict__.get("config")
        if not hasattr(config, "_attn_implementation_internal"):
            continue
        if id(config) not in copies:
            copies[id(config)] = undo.copy_config(config)
            copies[id(config)]._attn_implementation_internal = name
        own = OwnConfig(module, copies[id(config)], config._attn_implementation_internal, name)
        undo.set_attribute(module, "config", own.config)
        undo.set_attribute(module, STREAM_OF_MODULE, stream)
        own_configs.append(own)
    return own_configs

"""What a model says better than its config: what of it is trained, and what its layers have that is their own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from mst_ds.model_shape import ModelShape, TrainedCounts
from mst_ds.structure import Chunkable, MlpStructure, decoder_layers, find_mixers, find_mlps, why_own_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def trained_shape(shape: ModelShape, model: PreTrainedModel) -> ModelShape:
    """`shape` with the parameters that `model` has and trains, below the adapters of peft where it has these; and with
    its attention as it is.

    Args:
        shape: of the model's config.
        model: whose parameters are only counted; it may be on the meta device.
    """
    is_whole = why_own_attention(model) is not None or not all(mixer.carries for mixer in find_mixers(model))
    found = find_mlps(model, required=False)
    shape = _with_dense_mlps(replace(shape, has_own_attention=is_whole), found)
    all_parameters, trained = _count(model.parameters()), _count(model.parameters(), trained=True)
    if trained == all_parameters == shape.parameter_count:
        return shape
    layers = decoder_layers(model)
    mlps = [mlp.module for mlp in found]
    of_mlps = [_trained_of_mlp(mlp) for mlp in mlps]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = not shape.head_parameter_count
    of_embedding, of_head = (_count(module.parameters(), trained=True) for module in (embedding, head))
    counts = TrainedCounts(
        all=trained,
        layer=max((_count(layer.parameters(), trained=True) for layer in layers), default=0),
        mlp=None if None in of_mlps else max((count for count in of_mlps if count is not None), default=0),
        head=of_head,
        embedding=0 if is_tied else of_embedding,
        largest=max((weight.numel() for weight in model.parameters() if weight.requires_grad), default=0),
        dropout_width=max((_dropout_width(layer, mlps) for layer in layers), default=0),
    )
    of_layers = (_count(layer.parameters()) for layer in layers)
    return replace(
        shape,
        parameter_count=all_parameters,
        layer_parameter_count=max(of_layers, default=shape.layer_parameter_count),
        trained=counts,
    )


def _with_dense_mlps(shape: ModelShape, mlps: list[Chunkable]) -> ModelShape:
    """With their width, which a config may say under a name of its own, and as what they are worked through."""
    if shape.experts is not None or not mlps or not shape.layers_are_alike:
        return shape
    changes: dict[str, Any] = {}
    widths = [mlp.down.weight.numel() // shape.hidden_size for mlp in mlps if isinstance(mlp, MlpStructure)]
    # With adapters inside, its own forward runs, too: that is said by what is trained.
    if not widths and all(_trained_of_mlp(mlp.module) is None for mlp in mlps):
        of_width = (3 if shape.gated_mlp else 2) * shape.hidden_size
        widths = [_count(mlp.module.parameters()) // of_width for mlp in mlps]
        changes["has_plain_mlp"] = False
    width = max(widths, default=shape.intermediate_size)
    layers = tuple(replace(layer, intermediate_size=width, **changes) for layer in shape.layers)
    return replace(shape, intermediate_size=width, layers=layers)


def _trained_of_mlp(module: nn.Module) -> int | None:
    """None: all of it."""
    trained = _count(module.parameters(), trained=True)
    return None if trained == _count(module.parameters()) else trained


def _dropout_width(layer: nn.Module, mlps: Iterable[nn.Module]) -> int:
    """Of peft's LoRA layers, of which each drops elements of its own copy of the input."""
    inside = {module for mlp in mlps for module in mlp.modules()}
    width = 0
    module: Any
    for module in set(layer.modules()) - inside:
        dropouts = getattr(module, "lora_dropout", {}).values()
        width += sum(module.in_features for dropout in dropouts if isinstance(dropout, nn.Dropout))
    return width


def _count(parameters: Iterable[nn.Parameter], *, trained: bool = False) -> int:
    return sum(weight.numel() for weight in parameters if weight.requires_grad or not trained)

"""Measures what a model's mixers need for each token: their forward and backward run on tensors without values."""

from __future__ import annotations

import copy
import functools
from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds.attention import Documents
from mst_ds.memory.dry_run import as_on_an_accelerator
from mst_ds.memory.live import LiveMemory
from mst_ds.mixers import MixedSequence
from mst_ds.model_shape import MixerShape, ModelShape
from mst_ds.structure import decoder_layers, find_mixers, is_attention
from mst_ds.structure.lightning import LightningStructure
from mst_ds.structure.mixers import MixerStructure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WholeMixer: TypeAlias = MixerStructure | LightningStructure

# What a token needs is the difference: kernels work in blocks of up to 256 tokens, and these have whole ones.
_LENGTHS = (1024, 2048)


def with_mixers(shape: ModelShape, model: PreTrainedModel, dtype: torch.dtype) -> ModelShape:
    """`shape` with what the mixers of the model need; as it is where it has none, or they cannot run without values.

    Args:
        shape: of the model's config.
        model: on the meta device.
        dtype: of the training.
    """
    all_mixers, layers = find_mixers(model), decoder_layers(model)
    # What is a part of a module that has more than it does not run on hidden states alone, and Mamba's scan goes token
    # by token, which takes a minute.
    found = {
        mixer.module: mixer
        for mixer in all_mixers
        if isinstance(mixer, LightningStructure) or (isinstance(mixer, MixerStructure) and mixer.carries)
    }
    if len(layers) != shape.num_hidden_layers or len(found) < len(all_mixers):
        return shape
    mixers = [[module for module in layer.modules() if module in found] for layer in layers]
    # Each kind once: a delta rule takes two seconds.
    of_kinds = {_kind(module): found[module] for inside in mixers for module in inside}
    needs = {kind: _measured(mixer, shape.hidden_size, dtype) for kind, mixer in of_kinds.items()}
    measured = {kind: needed for kind, needed in needs.items() if needed is not None}
    if not needs or len(measured) < len(needs):
        return shape
    shapes = tuple(
        replace(
            of_layer,
            has_attention=any(is_attention(module) for module in layer.modules()),
            mixer=functools.reduce(_then, [measured[_kind(module)] for module in inside]) if inside else None,
        )
        for of_layer, layer, inside in zip(shape.layers, layers, mixers, strict=True)
    )
    return replace(shape, layers=shapes)


def _then(one: MixerShape, other: MixerShape) -> MixerShape:
    """Two of a layer, one after the other: what the first leaves is there while the second runs."""
    return MixerShape(
        matrix_elements=one.matrix_elements + other.matrix_elements,
        saved_bytes=one.saved_bytes + other.saved_bytes,
        saving_bytes=max(one.saving_bytes, one.saved_bytes + other.saving_bytes),
        forward_bytes=max(one.forward_bytes, other.forward_bytes),
        backward_bytes=max(one.backward_bytes, one.saved_bytes + other.backward_bytes),
    )


def _kind(module: nn.Module) -> Hashable:
    """Equal for modules that need the same."""
    return type(module), *((name, tensor.shape) for name, tensor in module.named_parameters())


def _measured(mixer: _WholeMixer, hidden_size: int, dtype: torch.dtype) -> MixerShape | None:
    needed = _bytes_of_token(mixer, hidden_size, dtype)
    projections = (part.weight.numel() for part in mixer.module.modules() if isinstance(part, nn.Linear))
    return None if needed is None else MixerShape(sum(projections), *needed)


def _bytes_of_token(mixer: _WholeMixer, hidden_size: int, dtype: torch.dtype) -> list[int] | None:
    """The last four of `MixerShape`."""
    mixer = replace(mixer, module=copy.deepcopy(mixer.module).train())
    try:
        with FakeTensorMode(), as_on_an_accelerator():
            mixer.module._apply(lambda tensor: torch.empty(tensor.shape, dtype=_dtype(tensor, dtype), device="cpu"))
            short, long = (_bytes_of(mixer, hidden_size, length, dtype) for length in _LENGTHS)
    except Exception:  # a kernel that wants a GPU and values raises anything
        return None
    return [round((more - less) / (_LENGTHS[1] - _LENGTHS[0])) for less, more in zip(short, long, strict=True)]


def _dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _bytes_of(mixer: _WholeMixer, hidden_size: int, length: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Of a row of so many tokens, as `_bytes_of_token` has them."""
    for parameter in mixer.module.parameters():
        parameter.grad = torch.empty_like(parameter)
    hidden = torch.empty(1, length, hidden_size, dtype=dtype, requires_grad=True)
    of_hidden = hidden.numel() * hidden.element_size()
    memory = LiveMemory()

    def run() -> torch.Tensor:
        memory.reset_peak()
        result = mixer.run(MixedSequence(None, Documents()), hidden)
        output: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return output

    with memory:
        with torch.no_grad():
            run()
        forward = memory.peak - of_hidden
        output = run()
        saved, saving = memory.live - of_hidden, memory.peak - of_hidden
        memory.reset_peak()
        # Counted of it are the output and its gradient, which are beside it.
        output.backward(torch.empty_like(output))
        return saved, saving, forward, memory.peak - 2 * of_hidden

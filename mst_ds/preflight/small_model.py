"""A model of the user's architecture with a few thousand random parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mst_ds.preflight.float64 import Float64
from mst_ds.preflight.shrink import LAYER_COUNTS, shrink_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_MAX_PARAMETERS = 500_000
_LAYER_INDEX = re.compile("idx|index|layer_(id|num)")


@dataclass(frozen=True)
class _LayerKind:
    """What makes one kind of decoder layer differ from another within a model.

    Args:
        modules: the names and classes of the modules, with those settings that are no numbers.
        numbers: the settings that are whole numbers, which may be flags: not the same in a model of other sizes.
    """

    modules: frozenset[tuple[str, ...]]
    numbers: frozenset[tuple[str, ...]]

    @classmethod
    def of(cls, layer: nn.Module) -> _LayerKind:
        modules, numbers = set(), set()
        for name, module in layer.named_modules():
            where = re.sub(r"\d+", "*", name)  # experts are alike
            modules.add((where, type(module).__name__, *_settings(module)))
            numbers.add((where, *_numbers(module)))
        return cls(frozenset(modules), frozenset(numbers))


def build_small_model(config: PreTrainedConfig, *, seq_len: int) -> PreTrainedModel:
    """A model in float64 with at least one decoder layer of every kind that a model of `config` has.

    Weights are random, and the same every time; biases and norms are not 0 and 1, so that each counts.

    Args:
        config: the user's; it is left as it is.
        seq_len: S, the longest sequence that the small model will see.

    Raises:
        ValueError: the config cannot be shrunk; the text says why.
    """
    name = type(config).__name__
    kinds = _layer_kinds(_empty_model(config))
    layers = sorted({kinds.index(kind) for kind in kinds})
    if len(layers) < 2:
        layers = list(range(min(2, len(kinds))))
    # The kind of a layer may follow from its index: then the first layers show what some of them do not. Layers may
    # share weights, which takes two.
    failure = ValueError(f"{name} cannot be shrunk: with fewer layers they are not of the kinds that it has")
    for kept in (layers, range(max(layers) + 1), _two_of_each(kinds)):
        try:
            small = _shrunk(config, kept, seq_len)
            model = _empty_model(small)
        except ValueError as error:
            failure = error
            continue
        if _are_alike(_layer_kinds(model), [kinds[layer] for layer in kept]):
            break
    else:
        raise failure
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if sum(sizes.values()) > _MAX_PARAMETERS:
        largest = max(sizes, key=sizes.__getitem__)
        raise ValueError(f"{name} cannot be shrunk: {largest} still has {sizes[largest]} elements")
    return _random_model(small)


def _two_of_each(kinds: list[_LayerKind]) -> list[int]:
    """The first two layers of each kind."""
    return [index for index, kind in enumerate(kinds) if kinds[:index].count(kind) < 2]


def _are_alike(small: list[_LayerKind], full: list[_LayerKind]) -> bool:
    """Whether the layers have the same modules, and the same of them are of one kind."""
    return [kind.modules for kind in small] == [kind.modules for kind in full] and [
        small.index(kind) for kind in small
    ] == [full.index(kind) for kind in full]


def _shrunk(config: PreTrainedConfig, layers: Sequence[int], seq_len: int) -> PreTrainedConfig:
    try:
        return shrink_config(config, layers=layers, seq_len=seq_len)
    except Exception as error:  # a config's class may raise anything; most name the field
        raise ValueError(f"{type(config).__name__} cannot be shrunk: {' '.join(str(error).split())}") from error


def _empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return _build(config)


def _build(config: PreTrainedConfig) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        # Eager attention is the truth, and the only one with softcaps and sinks; the other experts have no float64.
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
    except Exception as error:  # whatever the model's class raises
        reason = " ".join(str(error).split())
        raise ValueError(f"{type(config).__name__}: transformers cannot build the model: {reason}") from error


def _layer_kinds(model: PreTrainedModel) -> list[_LayerKind]:
    counts = [count for name in LAYER_COUNTS if (count := getattr(model.config, name, None)) is not None]
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    layers = next((layers for count in counts for layers in lists if len(layers) == count), None)
    if layers is None:
        raise ValueError(
            f"{type(model).__name__} has no list of the {counts[0]} layers that its config names, as a model that runs "
            "some of them several times; allowed: models that run each once"
        )
    return [_LayerKind.of(layer) for layer in layers]


def _settings(module: nn.Module) -> list[str]:
    parameters = [f"{name}: {parameter is not None}" for name, parameter in module._parameters.items()]
    return parameters + [
        f"{name}: {value}"
        for name, value in sorted(module.__dict__.items())
        if value is None or isinstance(value, bool | str)
    ]


def _numbers(module: nn.Module) -> list[str]:
    return [
        f"{name}: {value}"
        for name, value in sorted(module.__dict__.items())
        if type(value) is int and not _LAYER_INDEX.search(name)
    ]


def _random_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]), Float64(), torch.no_grad():
        torch.manual_seed(0)
        model = _build(config)
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return model.train()

"""Finds the parts of layers that are not attention and let tokens meet: by the functions that their forwards call."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mst_ds.mixers import KNOWN, OPERATORS, MixedSequence, with_operators

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MixerStructure:
    """A module whose tokens meet in functions that this project has operators for, and nowhere else."""

    module: nn.Module

    def run(self, sequence: MixedSequence, *args: Any, **kwargs: Any) -> Any:
        """Its own forward on a shard of this sequence, with these operators."""
        return with_operators(_plain_forward(self.module), sequence)(self.module, *args, **kwargs)


def find_mixers(model: PreTrainedModel) -> list[MixerStructure]:
    """The modules whose own forward calls such functions, and no other of its file that is not known."""
    return [MixerStructure(module) for module in model.modules() if is_mixer(module)]


def is_mixer(module: nn.Module) -> bool:
    """Whether the module's own forward does."""
    forward = _plain_forward(module)
    if "forward" in module.__dict__ or not isinstance(forward, types.FunctionType):
        return False
    names = set(forward.__code__.co_names)
    called = {name for name in names if isinstance(forward.__globals__.get(name), types.FunctionType)}
    return not called.isdisjoint(OPERATORS) and called <= KNOWN


def is_attention(module: nn.Module) -> bool:
    """Whether the module's own forward looks up its attention function where this project's is registered."""
    forward = _plain_forward(module)
    return isinstance(forward, types.FunctionType) and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _plain_forward(module: nn.Module) -> Any:
    # Without the decorators of transformers, which look after offloading by accelerate.
    return inspect.unwrap(type(module).forward)

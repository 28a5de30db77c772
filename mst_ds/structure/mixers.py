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
        return with_operators(plain_forward(self.module), sequence)(self.module, *args, **kwargs)


def find_mixers(model: PreTrainedModel) -> list[MixerStructure]:
    """The modules whose own forward calls such functions, and no other of its file that is not known."""
    return [MixerStructure(module) for module in model.modules() if is_mixer(module)]


def is_mixer(module: nn.Module) -> bool:
    """Whether the module's own forward does."""
    forward = plain_forward(module)
    is_own = "forward" not in module.__dict__ and not _is_wrapped_by_others(type(module))
    if not is_own or not isinstance(forward, types.FunctionType):
        return False
    called = {name for name in names_of(forward.__code__) if callable(forward.__globals__.get(name))}
    return not called.isdisjoint(OPERATORS) and called <= KNOWN


def is_attention(module: nn.Module) -> bool:
    """Whether the module's own forward looks up its attention function where this project's is registered."""
    forward = plain_forward(module)
    return isinstance(forward, types.FunctionType) and "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def names_of(code: types.CodeType) -> set[str]:
    """That the code looks up, and what is defined inside of it, such as a generator."""
    inside = [names_of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return set(code.co_names).union(*inside)


def _is_wrapped_by_others(module_class: type[nn.Module]) -> bool:
    """Whether its forward has a wrapper that is not transformers' own: a plan would pass that by."""
    forward = module_class.forward
    while (wrapped := getattr(forward, "__wrapped__", None)) is not None:
        # Not by __module__, which a wrapper takes over from what it wraps.
        if not getattr(forward, "__globals__", {}).get("__name__", "").startswith("transformers."):
            return True
        forward = wrapped
    return False


def plain_forward(module: nn.Module) -> Any:
    """The module's own, without the decorators of transformers, which look after offloading by accelerate."""
    return inspect.unwrap(type(module).forward)

"""Finds the parts of layers that are not attention and let tokens meet: by what their forwards call, or compute."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

from torch import Tensor, nn

from mst_ds.mixers import KNOWN, METHODS, OPERATORS, WHOLE, MixedSequence, with_operators
from mst_ds.structure.lightning import LightningStructure, is_lightning

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class MixerStructure:
    """A module whose tokens meet in functions that this project has operators for, and nowhere else.

    Attributes of all mixers:
        attribute: which of the module's an operator takes the place of.
        carries: whether it hands a state from chunk to chunk of a layer, which may then be worked through in several.
    """

    module: nn.Module
    carries: bool
    attribute = "forward"

    def run(self, sequence: MixedSequence, *args: Any, **kwargs: Any) -> Any:
        """Its own forward on a shard of this sequence, with these operators."""
        return with_operators(plain_forward(self.module), sequence)(self.module, *args, **kwargs)


@dataclass(frozen=True)
class MethodStructure:
    """A module whose tokens meet in one of its methods that this project has an operator for, and nowhere else.

    attribute: the method's name.
    """

    module: nn.Module
    attribute: str
    carries = True

    def run(self, sequence: MixedSequence, *args: Any, **kwargs: Any) -> Any:
        """The method on a shard of this sequence."""
        method = getattr(type(self.module), self.attribute).__get__(self.module)
        return METHODS[self.attribute](sequence, method, *args, **kwargs)


@dataclass(frozen=True)
class ConvolutionStructure:
    """A convolution that is padded on both sides, of whose output a forward takes as many tokens as went in."""

    module: nn.Conv1d
    attribute, carries = "forward", True

    def run(self, sequence: MixedSequence, hidden_states: Tensor) -> Tensor:
        """(B, C, L) -> (B, C', L), of a shard of this sequence."""

        def causal(hidden_states: Tensor, weight: Tensor) -> Tensor:
            output: Tensor = nn.Conv1d.forward(self.module, hidden_states)
            return output[:, :, : hidden_states.shape[2]]

        mixed: Tensor = OPERATORS["causal_conv1d_fn"](sequence, causal, hidden_states, self.module.weight)
        return mixed


Mixer: TypeAlias = MixerStructure | MethodStructure | ConvolutionStructure | LightningStructure


def find_mixers(model: PreTrainedModel) -> list[Mixer]:
    """Where tokens meet outside attention, in modules of whose own forwards nothing else is unknown."""
    return [mixer for module in model.modules() for mixer in _mixers_of(module)]


def is_mixer(module: nn.Module) -> bool:
    """Whether tokens meet in the module's own forward, in ways that are known."""
    return bool(_mixers_of(module))


def _mixers_of(module: nn.Module) -> list[Mixer]:
    """What the module's own forward calls that lets tokens meet; none where it calls what is not known."""
    forward = plain_forward(module)
    is_own = "forward" not in module.__dict__ and not _is_wrapped_by_others(type(module))
    if not is_own or not isinstance(forward, types.FunctionType):
        return []
    names = names_of(forward.__code__)
    called = {name for name in names if callable(forward.__globals__.get(name))}
    if not called <= KNOWN:
        return []
    if not called.isdisjoint(OPERATORS):
        return [MixerStructure(module, carries=called.isdisjoint(WHOLE))]
    if methods := [name for name in METHODS if name in names and callable(getattr(type(module), name, None))]:
        return [MethodStructure(module, name) for name in methods]
    if is_lightning(module):
        return [LightningStructure(module)]
    return [*_convolutions_of(module, names)]


def _convolutions_of(module: nn.Module, names: set[str]) -> list[ConvolutionStructure]:
    """The causal convolutions among the children that a forward names, where no other is unknown: of its own file."""
    children = {name: child for name, child in module.named_children() if name in names}
    found = [ConvolutionStructure(child) for child in children.values() if _is_causal(child)]
    others = (child for child in children.values() if type(child).__module__ == type(module).__module__)
    return found if found and all(map(is_mixer, others)) else []


def _is_causal(module: nn.Module) -> TypeGuard[nn.Conv1d]:
    if type(module) is not nn.Conv1d or "forward" in module.__dict__:
        return False
    is_plain = (module.stride, module.dilation, module.padding_mode) == ((1,), (1,), "zeros")
    return is_plain and module.padding == (module.kernel_size[0] - 1,)


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

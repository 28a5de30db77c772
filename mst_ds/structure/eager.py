"""Finds attention that a model writes out itself: by the functions that its forward looks up."""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from mst_ds.eager_attention import EagerAttention
from mst_ds.structure.layers import decoder_layers
from mst_ds.structure.mixers import is_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SOFTMAX = {"Softmax", "softmax"}
# `@` is no name.
_PRODUCTS = {"@", "baddbmm", "bmm", "matmul"}
_BOTH = "scaled_dot_product_attention"


def find_eager_attention(model: PreTrainedModel) -> list[EagerAttention]:
    """The modules of decoder layers whose forwards multiply and take a softmax, where a layer has no attention that
    looks this project's up. They say as they run whether that was attention."""
    if model._supports_attention_backend:
        return []
    layers = [layer for layer in decoder_layers(model) if not any(map(is_attention, layer.modules()))]
    return [EagerAttention(module) for layer in layers for module in layer.modules() if is_eager_attention(module)]


def is_eager_attention(module: nn.Module) -> bool:
    """Whether the module's own forward, with its methods that it calls, does so."""
    forward = inspect.unwrap(type(module).forward)
    if not isinstance(forward, types.FunctionType) or "forward" in module.__dict__:
        return False
    called = set(_called(type(module), forward, set()))
    return _BOTH in called or not (called.isdisjoint(_SOFTMAX) or called.isdisjoint(_PRODUCTS))


def _called(owner: type[Any], function: types.FunctionType, known: set[types.CodeType]) -> Iterator[str]:
    """The names and operators that a method uses, and the methods of its class that it names."""
    code = function.__code__
    if code in known:
        return
    known.add(code)
    yield from (each.argrepr for each in dis.get_instructions(code) if each.opname == "BINARY_OP")
    for name in code.co_names:
        yield name
        method = getattr(owner, name, None)
        if isinstance(method, types.FunctionType) and method is not getattr(nn.Module, name, None):
            yield from _called(owner, method, known)

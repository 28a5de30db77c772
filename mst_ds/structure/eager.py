"""Finds attention that a model writes out itself: by the functions that its forward looks up, and by running it."""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mst_ds.eager_attention import EAGER_ATTENTION_NAME, EagerAttention, NotUnderstood, register_eager_attention
from mst_ds.sequence_parallel import UlyssesContext
from mst_ds.structure.layers import decoder_layers
from mst_ds.structure.mixers import is_attention
from mst_ds.structure.probe import shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SOFTMAX = {"Softmax", "softmax"}
# `@` is no name.
_PRODUCTS = {"@", "baddbmm", "bmm", "matmul"}
_BOTH = "scaled_dot_product_attention"
_TOKENS = 8
# Of models, which are asked several times.
_understood: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def find_eager_attention(model: PreTrainedModel) -> list[EagerAttention]:
    """The modules of decoder layers whose forwards multiply and take a softmax, where a layer has no attention that
    looks this project's up. None where one of them does more with its scores than this project knows."""
    if model._supports_attention_backend:
        return []
    layers = [layer for layer in decoder_layers(model) if not any(map(is_attention, layer.modules()))]
    found = [EagerAttention(module) for layer in layers for module in layer.modules() if _multiplies(module)]
    if model not in _understood:
        _understood[model] = not found or _are_understood(model, found)
    return found if _understood[model] else []


def _are_understood(model: PreTrainedModel, found: Sequence[EagerAttention]) -> bool:
    """Whether a copy of the model on the meta device runs with them. What else it fails with, it says as it runs."""
    try:
        _run_on_meta(model, found)
    except NotUnderstood:
        return False
    except Exception:  # a model's own code may raise anything
        return True
    return True


def _run_on_meta(model: PreTrainedModel, found: Sequence[EagerAttention]) -> None:
    register_eager_attention()
    names = {module: name for name, module in model.named_modules()}
    tensors = itertools.chain(model.parameters(), model.buffers())
    on_meta = copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors}).eval()
    for module in on_meta.modules():
        config: Any = module.__dict__.get("config")
        if hasattr(config, "_attn_implementation_internal"):
            config._attn_implementation_internal = EAGER_ATTENTION_NAME
    positions = torch.arange(_TOKENS, device="meta")[None]
    context = UlyssesContext(None, "sdpa", None, positions=positions)
    for attention in found:
        attending = on_meta.get_submodule(names[attention.module])
        run = functools.partial(EagerAttention(attending).run, attending.forward, context, None)
        attending.__dict__["forward"] = run
    with torch.no_grad():
        # With a mask, as without one transformers looks into the positions.
        ids, mask = torch.zeros_like(positions), torch.ones_like(positions)
        on_meta.base_model(input_ids=ids, attention_mask=mask, use_cache=False)


def _on_meta(tensor: Tensor) -> Tensor:
    like = torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")
    return nn.Parameter(like, requires_grad=False) if isinstance(tensor, nn.Parameter) else like


def _multiplies(module: nn.Module) -> bool:
    """Whether the module's own forward, with its methods that it calls, multiplies and takes a softmax."""
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

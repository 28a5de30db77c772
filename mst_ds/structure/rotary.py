"""Finds the attention modules whose rotary embedding can be computed without copies of queries and keys."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mst_ds.minisequence import rotary_embedding
from mst_ds.structure import probe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rotary = Callable[..., tuple[Tensor, Tensor]]

# Models of transformers call it by this name, each its own.
_NAME = "apply_rotary_pos_emb"
# Of heads and of angles, which stay in fp32 in some models, and under autocast.
_DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
_BATCH, _HEADS, _KEY_HEADS, _TOKENS, _WIDTH = 2, 3, 2, 5, 8


@dataclass(frozen=True)
class RotaryStructure:
    """An attention module whose forward rotates halves of queries and keys."""

    module: nn.Module

    def forward(self) -> types.MethodType:
        """The module's forward with our operator for its rotary embedding: a copy of the function, with other globals,
        so that no other instance and no module of transformers is touched."""
        return types.MethodType(_with_our_rotary(type(self.module).forward), self.module)


@functools.cache
def _with_our_rotary(plain: types.FunctionType) -> types.FunctionType:
    # torch.compile remembers by code what it has put among the globals: each code goes with one dict of them, so that
    # all modules share one copy, and its code is not the class's.
    changed = types.FunctionType(
        plain.__code__.replace(),
        {**plain.__globals__, _NAME: functools.partial(_rotary, plain.__globals__[_NAME])},
        plain.__name__,
        plain.__defaults__,
        plain.__closure__,
    )
    changed.__kwdefaults__ = plain.__kwdefaults__
    functools.update_wrapper(changed, plain)
    return changed


def find_rotary(model: PreTrainedModel) -> list[RotaryStructure]:
    """The modules whose own forward calls transformers' rotary embedding, where that rotates halves, as a run on a few
    elements shows: in fp64 with its gradients, and as it is trained bit by bit."""
    known: dict[Any, bool] = {}
    found = []
    for module in model.modules():
        plain = type(module).forward
        if "forward" in module.__dict__ or not isinstance(plain, types.FunctionType):
            continue
        function = plain.__globals__.get(_NAME)
        if _NAME not in plain.__code__.co_names or not callable(function):
            continue
        if function not in known:
            known[function] = _rotates_halves(function)
        if known[function]:
            found.append(RotaryStructure(module))
    return found


def _rotary(
    original: Rotary, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    # What it was not tried with is the model's own affair.
    if args or kwargs or query.dim() != 4 or cos.dim() != 3 or cos.requires_grad or sin.requires_grad:
        return original(query, key, cos, sin, *args, **kwargs)
    # Angles of other tokens are its affair, too: it says what does not fit.
    if cos.shape[1] != query.shape[2] or len(cos) not in (1, len(query)) or key.shape[2] != query.shape[2]:
        return original(query, key, cos, sin)
    return rotary_embedding(query, cos, sin), rotary_embedding(key, cos, sin)


def _rotates_halves(function: Rotary) -> bool:
    ours = functools.partial(_rotary, function)
    with probe.isolated_rng():
        heads = [probe.random_tensor(_BATCH, count, _TOKENS, _WIDTH) for count in (_HEADS, _KEY_HEADS)]
        for width in (_WIDTH, _WIDTH // 2):
            angles = [probe.random_tensor(_BATCH, _TOKENS, width) for _ in range(2)]
            if probe.attempt(function, *heads, *angles) is None and width < _WIDTH:
                continue  # it knows no heads that are rotated in part
            if not probe.is_same(
                functools.partial(_joined, function, angles), functools.partial(_joined, ours, angles), heads, []
            ):
                return False
            for of_heads, of_angles in _DTYPES:
                given = *(x.to(of_heads) for x in heads), *(x.to(of_angles) for x in angles)
                if not all(map(torch.equal, function(*given), ours(*given))):
                    return False
    return True


def _joined(function: Rotary, angles: list[Tensor], query: Tensor, key: Tensor) -> Tensor:
    return torch.cat(function(query, key, *angles), dim=1)

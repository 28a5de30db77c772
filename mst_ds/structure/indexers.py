"""Finds the indexers that pick the keys of attention: by what their forwards call, and where the picks go."""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from mst_ds.mixers import CACHE, MASK
from mst_ds.structure.mixers import is_attention, names_of, plain_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By this name picks are handed to an attention function.
_INDICES = "indices"


@dataclass(frozen=True)
class IndexerStructure:
    """An indexer whose picks go to an attention function.

    Attributes:
        module: keeps its keys in a cache by `update_indexer`, and picks by `topk`.
        attention: calls it, and hands the picks on.
    """

    module: nn.Module
    attention: nn.Module

    @property
    def top_k(self) -> int:
        """How many keys it picks."""
        module: Any = self.module
        top_k: int = module.index_topk
        return top_k

    @property
    def width(self) -> int:
        """Of the queries of all its heads: nothing in it is wider."""
        return max(module.out_features for module in self.module.modules() if isinstance(module, nn.Linear))


def find_indexers(model: PreTrainedModel) -> list[IndexerStructure]:
    """Those that attention modules call whose own forward hands picks on."""
    return [
        IndexerStructure(child, module)
        for module in model.modules()
        if takes_picks(module)
        for child in module.children()
        if _is_indexer(child)
    ]


def takes_picks(module: nn.Module) -> bool:
    """Whether a module hands picks to its attention function, its own or another layer's."""
    return is_attention(module) and _hands_indices(plain_forward(module).__code__)


def _hands_indices(code: types.CodeType) -> bool:
    # Names of arguments of a call stand together among the constants.
    return any(isinstance(constant, tuple) and _INDICES in constant for constant in code.co_consts)


def _is_indexer(module: nn.Module) -> bool:
    forward = plain_forward(module)
    if "forward" in module.__dict__ or not isinstance(forward, types.FunctionType):
        return False
    called = {"update_indexer", "topk"} <= names_of(forward.__code__)
    return called and {MASK, CACHE} <= set(inspect.signature(forward).parameters) and hasattr(module, "index_topk")

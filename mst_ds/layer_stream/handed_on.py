"""What layers hand on to later ones in a mapping that all of them are given, such as transformers' `KVSharingDict`."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

# Keys and values of all heads: (B, K, L, D).
TOKEN_DIM = 2

Written = list[dict[Any, Any]]


class HandedOn:
    """The mappings among a layer's arguments.

    What is in them is an input of the layer, what it puts there an output. Of a chunk of tokens each is a mapping of
    its own, with those tokens of what is in it.

    Args:
        mappings: the callers'; they are held until `write`, for what is put there holds the layer's backward.
    """

    def __init__(self, mappings: Sequence[MutableMapping[Any, Any]]) -> None:
        self._mappings = list(mappings)
        self._empty = [copy.copy(mapping) for mapping in mappings]
        for mapping in self._empty:
            mapping.clear()
        self._leaves, self._spec = tree_flatten([dict(mapping) for mapping in mappings])
        self._places = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]

    def take_tensors(self) -> list[Tensor]:
        """Those in the mappings, in their order. They are held here no longer."""
        tensors = [self._leaves[place] for place in self._places]
        for place in self._places:
            self._leaves[place] = None
        return tensors

    def of_chunk(self, tensors: Sequence[Tensor]) -> tuple[list[MutableMapping[Any, Any]], Written]:
        """Mappings with these in place of `take_tensors`, and what is in them."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        contents: Written = tree_unflatten(leaves, self._spec)
        mappings = [copy.copy(mapping) for mapping in self._empty]
        for mapping, content in zip(mappings, contents, strict=True):
            mapping.update(content)
        return mappings, contents

    def write(self, written: Written) -> None:
        """Put into the callers' mappings what a layer has put into its own."""
        for mapping, content in zip(self._mappings, written, strict=True):
            mapping.update(content)
        self._mappings = []


def written_since(mappings: Sequence[Mapping[Any, Any]], contents: Written) -> Written:
    """What was put into mappings that had these contents."""
    return [
        {key: value for key, value in mapping.items() if content.get(key) is not value}
        for mapping, content in zip(mappings, contents, strict=True)
    ]

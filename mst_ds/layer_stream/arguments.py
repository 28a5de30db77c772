"""The arguments of a decoder layer: which of its tensors have tokens, and a chunk of them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .handed_on import TOKEN_DIM, HandedOn, Written, written_since


class LayerArguments:
    """What one call of a layer was given.

    A tensor has tokens if its second dimension, its third behind one of 1, or its only one is as long as that of the
    hidden states; it is cut into chunks. All else, objects included, goes to each chunk as it is, but for mappings that
    may be written to: see `HandedOn`.

    Args:
        args, kwargs: of the layer's forward; the hidden states, (B, L, ...), are the first tensor among them, or
            several of them one after another, (streams, B, L, ...).
        form: B and L of the forward; None where nobody knows.

    Attributes:
        length: L.
        batch: B.
        hidden_dim: the dimension of the hidden states that counts tokens.
        hidden_dims: of how many dimensions they are.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any], form: tuple[int, int] | None = None) -> None:
        self._leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
        self._mappings = [place for place, leaf in enumerate(self._leaves) if isinstance(leaf, MutableMapping)]
        self.handed_on = HandedOn([self._leaves[place] for place in self._mappings])
        for place in self._mappings:
            self._leaves[place] = None
        tensors = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        hidden_states = self._leaves[tensors[0]]
        self.hidden_dim, self.hidden_dims = _hidden_dim(hidden_states, form), hidden_states.dim()
        self.batch, self.length = hidden_states.shape[self.hidden_dim - 1 : self.hidden_dim + 1]
        others = [index for index in tensors[1:] if self._leaves[index].requires_grad]
        self._places = [tensors[0], *others]
        self._dims = [self.hidden_dim, *(self.token_dim(self._leaves[index]) for index in others)]

    def take_inputs(self) -> list[Tensor]:
        """The tensors that may be differentiated: hidden states first, those that were handed on last. They are held
        here no longer."""
        inputs: list[Tensor] = [self._leaves[index] for index in self._places]
        for index in self._places:
            self._leaves[index] = None
        handed_on = self.handed_on.take_tensors()
        self._dims += [TOKEN_DIM] * len(handed_on)
        return [*inputs, *handed_on]

    @property
    def num_own(self) -> int:
        """How many inputs are the layer's own: what was handed on is held by other layers, too."""
        return len(self._places)

    def chunk(self, tokens: slice, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any], ChunkMappings]:
        """args and kwargs for a chunk, with these in place of `inputs`, and the mappings among them."""
        leaves = [self.cut(leaf, tokens) for leaf in self._leaves]
        for index, tensor in zip(self._places, inputs, strict=False):
            leaves[index] = tensor
        mappings, contents = self.handed_on.of_chunk(inputs[self.num_own :])
        for index, mapping in zip(self._mappings, mappings, strict=True):
            leaves[index] = mapping
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs, ChunkMappings(mappings, contents)

    def input_dim(self, place: int) -> int | None:
        """The dimension of an input that counts tokens; None where there is none."""
        return self._dims[place]

    def cut_input(self, place: int, tensor: Tensor, tokens: slice) -> Tensor:
        """A chunk of an input, or of its gradient."""
        return self.cut_along(self._dims[place], tensor, tokens)

    def cut(self, leaf: Any, tokens: slice) -> Any:
        """A chunk of what has tokens; all else as it is."""
        if not isinstance(leaf, Tensor):
            return leaf
        return self.cut_along(self.token_dim(leaf), leaf, tokens)

    def cut_along(self, dim: int | None, tensor: Tensor, tokens: slice) -> Tensor:
        """A chunk of a tensor, of which this dimension counts tokens."""
        if dim is None or tokens == slice(0, self.length):
            return tensor
        return tensor.narrow(dim, tokens.start, tokens.stop - tokens.start)

    def token_dim(self, tensor: Tensor) -> int | None:
        """The dimension that counts tokens; None where there is none."""
        dim = min(1, tensor.dim() - 1)
        if tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[3] != self.length:
            dim = 2  # for all heads; a mask, of all tokens to all, stays whole
        return dim if dim >= 0 and tensor.shape[dim] == self.length else None


class ChunkMappings:
    """Those that a chunk was given, and what was in them."""

    def __init__(self, mappings: Sequence[MutableMapping[Any, Any]], contents: Written) -> None:
        self._mappings, self._contents = mappings, contents

    def written(self) -> Written:
        """What the layer has put there."""
        return written_since(self._mappings, self._contents)


def _hidden_dim(hidden_states: Tensor, form: tuple[int, int] | None) -> int:
    dims = range(1, hidden_states.dim())
    return next((dim for dim in dims if form == tuple(hidden_states.shape[dim - 1 : dim + 1])), 1)

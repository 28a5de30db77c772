"""The arguments of a decoder layer: which of its tensors have tokens, and a chunk of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class LayerArguments:
    """What one call of a layer was given.

    A tensor has tokens if its second dimension, its third behind one of 1, or its only one is as long as that of the
    hidden states; it is cut into chunks. All else, objects included, goes to each chunk as it is.

    Args:
        args, kwargs: of the layer's forward; the hidden states, (B, L, ...), are the first tensor among them.

    Attributes:
        length: L.
        batch: B.
    """

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._leaves, self._spec = tree_flatten((tuple(args), dict(kwargs)))
        tensors = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        hidden_states = self._leaves[tensors[0]]
        self.batch, self.length = hidden_states.shape[:2]
        others = [index for index in tensors[1:] if self._leaves[index].requires_grad]
        self._places = [tensors[0], *others]

    def take_inputs(self) -> list[Tensor]:
        """The tensors that may be differentiated, hidden states first. They are held here no longer."""
        inputs: list[Tensor] = [self._leaves[index] for index in self._places]
        for index in self._places:
            self._leaves[index] = None
        return inputs

    def chunk(self, tokens: slice, inputs: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """args and kwargs for a chunk, with these in place of `inputs`."""
        leaves = [self.cut(leaf, tokens) for leaf in self._leaves]
        for index, tensor in zip(self._places, inputs, strict=True):
            leaves[index] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        return args, kwargs

    def cut(self, leaf: Any, tokens: slice) -> Any:
        """A chunk of what has tokens; all else as it is."""
        if tokens == slice(0, self.length) or not isinstance(leaf, Tensor):
            return leaf
        dim = self.token_dim(leaf)
        return leaf if dim is None else leaf.narrow(dim, tokens.start, tokens.stop - tokens.start)

    def token_dim(self, tensor: Tensor) -> int | None:
        """The dimension that counts tokens; None where there is none."""
        dim = min(1, tensor.dim() - 1)
        if tensor.dim() == 4 and tensor.shape[1] == 1 and tensor.shape[3] != self.length:
            dim = 2  # for all heads; a mask, of all tokens to all, stays whole
        return dim if dim >= 0 and tensor.shape[dim] == self.length else None

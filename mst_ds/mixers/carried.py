"""What a mixer hands from chunk to chunk of a layer, and the gradient of it on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mst_ds.layer_stream import LayerCall, Pass
from mst_ds.recompute import Kept


class CarriedState:
    """A recurrent state, or the last tokens of a convolution, in one call of a layer.

    Each chunk begins with what the chunk before has left, which is kept for when it is computed again. Its gradient is
    there when that chunk's turn comes, since chunks are differentiated in reverse.
    """

    def __init__(self) -> None:
        self._left: Tensor | None = None
        self._kept: dict[int, Kept] = {}
        self._gradients: dict[int, Tensor] = {}

    def missing_keys(self, chunk: int) -> list[int]:
        """None: what chunks begin with is kept."""
        return []

    def end_forward(self) -> None:
        self._left = None

    def enter(self, call: LayerCall, anchor: Tensor) -> Tensor | None:
        """What the chunk that runs begins with; None in the first.

        Args:
            anchor: a tensor of the chunk that is differentiated, if anything is.
        """
        if call.chunk == 0:
            return None
        if call.runs_for is not Pass.FORWARD:
            state = self._kept[call.chunk].read()
        else:
            assert self._left is not None
            state = self._left
            if call.is_kept:
                self._kept[call.chunk] = call.part.keep(state)
        entered: Tensor = _Enter.apply(self, call.chunk, state, anchor)
        return entered

    def leave(self, call: LayerCall, output: Tensor, state: Tensor) -> Tensor:
        """`output`, whose backward goes on into what the chunk leaves."""
        if call.is_last:
            return output
        if call.runs_for is Pass.FORWARD:
            # On its own: a part of what the chunk has computed would keep all of that.
            self._left = state.detach().clone()
        left: Tensor = _Leave.apply(self, call.chunk, output, state)
        return left

    def put_gradient(self, chunk: int, grad: Tensor) -> None:
        """Of what a chunk has left; the chunk after it, which began with it, is done."""
        self._gradients[chunk] = grad
        self._kept.pop(chunk + 1, None)

    def take_gradient(self, chunk: int) -> Tensor | None:
        """None where nothing has read it."""
        return self._gradients.pop(chunk, None)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carried: CarriedState, chunk: int, state: Tensor, anchor: Tensor) -> Tensor:
        ctx.carried, ctx.chunk = carried, chunk
        return state.view_as(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.carried.put_gradient(ctx.chunk - 1, grad)
        return None, None, None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carried: CarriedState, chunk: int, output: Tensor, state: Tensor) -> Tensor:
        ctx.carried, ctx.chunk = carried, chunk
        return output.view_as(output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, grad, ctx.carried.take_gradient(ctx.chunk)

"""A part of the autograd graph that is kept without the tensors it began with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, saved_tensors_hooks

from .stores import Kept


class KeptGraph:
    """Runs `function` on `inputs` and keeps its graph, but neither its inputs nor its output.

    Both are given again to `backward`: the inputs computed again, the output from where the caller keeps it. What else
    the function's kernels saved for their backward, such as a log-sum-exp or a random seed, is kept, whatever kernels
    they are: none has to be known here.

    Args:
        function: of the inputs; gives one tensor that is differentiable by each of them.
        inputs: whose memory the function does not write to.
        keep: how other tensors are kept.
    """

    def __init__(
        self, function: Callable[..., Tensor], inputs: Sequence[Tensor], keep: Callable[[Tensor], Kept]
    ) -> None:
        # The table must not know the graph: what a graph saves may not lead back to it, or neither is ever freed.
        self._table = _Table(inputs, keep)
        begin = torch.empty(0, device=inputs[0].device, requires_grad=True)
        with torch.enable_grad(), saved_tensors_hooks(self._table.pack, self._table.unpack):
            given = _Begin.apply(begin, *(tensor.detach() for tensor in inputs))
            output = function(*given)
        assert output.grad_fn is not None
        self._edges = [GradientEdge(given[0].grad_fn, index) for index in range(len(inputs))]
        self._end: GradientEdge | None = GradientEdge(output.grad_fn, output.output_nr)
        self._output: Tensor | None = output.detach()

    def take_output(self) -> Tensor:
        """The function's output, to be put where the caller keeps it. To be called once."""
        output, self._output = self._output, None
        assert output is not None
        self._table.finish(output)
        return output

    def backward(self, inputs: Sequence[Tensor], output: Tensor, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each input, after which nothing is kept.

        Args:
            inputs: the values of the first time.
            output: the values of the first time, in any layout.
        """
        end, self._end = self._end, None
        if end is None:
            raise RuntimeError("attention cannot be differentiated a second time: compute the loss again")
        with self._table.given([*inputs, output]):
            return torch.autograd.grad([end], self._edges, [grad_output], allow_unused=True)


class _Begin(torch.autograd.Function):
    """Where a graph begins. A leaf would hold its tensor for as long as the graph lives."""

    @staticmethod
    def forward(ctx: Any, begin: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tensors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise AssertionError("gradients are taken where the graph begins")


class _Table:
    """What stands in a graph in place of the tensors that it saved."""

    def __init__(self, inputs: Sequence[Tensor], keep: Callable[[Tensor], Kept]) -> None:
        self._keep = keep
        self._saved: list[_Saved] = []
        # What is given in the backward, as it was laid out the first time.
        self._layouts = [_Layout.of(tensor) for tensor in inputs]
        self._memory = {_memory(tensor): place for place, tensor in enumerate(inputs)}
        # Inputs may share their memory, as parts of one projection; given again they need not.
        self._places = {(_memory(tensor), _Layout.of(tensor)): place for place, tensor in enumerate(inputs)}
        self._given: Sequence[Tensor] = ()

    def pack(self, tensor: Tensor) -> _Saved:
        layout, memory = _Layout.of(tensor), _memory(tensor)
        saved = _Saved(layout, self._places.get((memory, layout), self._memory.get(memory)))
        if saved.source is None:
            saved.tensor = tensor
            self._saved.append(saved)
        return saved

    def finish(self, output: Tensor) -> None:
        """The function is done: decide what becomes of each tensor that was saved and is no input."""
        self._layouts.append(_Layout.of(output))
        # Where the output is a part of what a kernel made, what that kernel saved is not a part of the output.
        is_all = output.numel() * output.itemsize == output.untyped_storage().nbytes()
        self._memory = {_memory(output): len(self._layouts) - 1} if is_all else {}
        shared: dict[Any, _Shared] = {}
        for saved in self._saved:
            tensor, saved.tensor = saved.tensor, None
            assert tensor is not None
            key = _memory(tensor)
            saved.source = self._memory.get(key)
            if saved.source is None:
                if key not in shared:
                    shared[key] = _Shared(self._keep(_all_memory(tensor)))
                shared[key].users += 1
                saved.shared = shared[key]
        self._saved = []

    def unpack(self, saved: _Saved) -> Tensor:
        if saved.shared is not None:
            return saved.layout.of_memory(saved.shared.use())
        assert saved.source is not None
        return saved.layout.within(self._given[saved.source], self._layouts[saved.source])

    @contextmanager
    def given(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within, these are the inputs and the output."""
        self._given = tensors
        try:
            yield
        finally:
            self._given = ()


@dataclass(frozen=True)
class _Layout:
    """How a tensor lies in its memory."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def of_memory(self, memory: Tensor) -> Tensor:
        return memory.as_strided(self.size, self.stride, self.offset)

    def within(self, whole: Tensor, first: _Layout) -> Tensor:
        """The part of `whole` that this was when that was laid out as `first`."""
        if self == first:
            return whole
        if whole.stride() != first.stride:
            whole = torch.empty_strided(first.size, first.stride, dtype=whole.dtype, device=whole.device).copy_(whole)
        return whole.as_strided(self.size, self.stride, self.offset - first.offset + int(whole.storage_offset()))


@dataclass
class _Saved:
    """Stands in the graph for a tensor: a part of what is given, or of memory that is kept."""

    layout: _Layout
    source: int | None
    tensor: Tensor | None = None
    shared: _Shared | None = None


@dataclass
class _Shared:
    """Memory that is kept, for so many tensors in it."""

    kept: Kept
    users: int = 0
    taken: Tensor | None = None

    def use(self) -> Tensor:
        memory = self.kept.take() if self.taken is None else self.taken
        self.users -= 1
        self.taken = memory if self.users else None
        return memory


def _memory(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.untyped_storage()._cdata, tensor.dtype


def _all_memory(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)

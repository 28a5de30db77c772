"""Whether the output of a layer's last operator is needed when the layer is computed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class LastOutput:
    """Finds the operator after which a chunk saves nothing for its backward: nobody reads that one's output then.

    With an MLP as the last operator this is its down projection, a third of its products. It is the same in every chunk
    and step, as long as the same parameters are trained: the first chunk tells, and computes all.

    Attributes:
        is_known: whether a chunk has told.
    """

    def __init__(self) -> None:
        self.is_known = False
        self._unread: int | None = None
        self._asked = 0
        self._last: int | None = None

    @contextmanager
    def learned(self) -> Iterator[None]:
        """A chunk is computed within, for its backward."""
        self._asked, self._last = 0, None
        if self.is_known:
            yield
            return
        with saved_tensors_hooks(self._saved, _as_it_is):
            yield
        self._unread, self.is_known = self._last, True

    @contextmanager
    def of_operator(self) -> Iterator[bool]:
        """An operator runs within; whether nobody will read its output."""
        number = self._asked
        self._asked += 1
        yield self.is_known and number == self._unread
        self._last = number

    def _saved(self, tensor: Tensor) -> Tensor:
        self._last = None
        return tensor


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor

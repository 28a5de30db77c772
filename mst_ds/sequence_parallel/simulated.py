"""A sequence group of threads: what several ranks compute, in one process without torch.distributed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from .groups import SequenceGroup

T = TypeVar("T")


def run_simulated(function: Callable[[SequenceGroup], T], size: int) -> list[T]:
    """Call `function(group)` on `size` threads, whose groups exchange through memory; return the results by rank.

    For tensors on the CPU: there autograd runs a backward in the thread that asks for it, so forward and backward may
    both exchange. torch's modes (autocast, no_grad, function and dispatch modes) are each thread's own, its random
    number generator is shared.

    Raises:
        Exception: what the first thread to fail raised; the others end at their next exchange.
        RuntimeError: the ranks do not call the same exchanges in the same order.
    """
    exchange = _Exchange(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(_ThreadGroup(rank, size, exchange))
            with exchange.posted(rank, "end", None):
                pass
        except BaseException as error:
            errors.append(error)  # the first entry is the cause: only an abort breaks the barrier for others
            exchange.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        exchange.abort()
    if errors:
        raise errors[0]
    return results


class _Exchange:
    """Where the threads meet: each posts a call, and reads what the others posted before any goes on."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._posts: list[tuple[str, Any]] = [("", None)] * size

    @contextmanager
    def posted(self, rank: int, call: str, value: Any) -> Iterator[list[Any]]:
        self._posts[rank] = (call, value)
        self._barrier.wait()
        calls = [name for name, _ in self._posts]
        if len(set(calls)) > 1:
            raise RuntimeError(f"the ranks of a sequence group call different exchanges: {', '.join(calls)}")
        yield [posted for _, posted in self._posts]
        self._barrier.wait()

    def abort(self) -> None:
        self._barrier.abort()


@dataclass(frozen=True)
class _ThreadGroup:
    rank: int
    size: int
    exchange: _Exchange

    def all_to_all(self, received: Tensor, send: Tensor, receive_splits: list[int], send_splits: list[int]) -> None:
        with self.exchange.posted(self.rank, "all_to_all", send.split(send_splits)) as parts:
            for target, sent in zip(received.split(receive_splits), parts, strict=True):
                target.copy_(sent[self.rank])

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        with self.exchange.posted(self.rank, "all_gather", tensor) as tensors:
            return [other.clone() for other in tensors]

    def all_reduce(self, tensor: Tensor) -> None:
        with self.exchange.posted(self.rank, "all_reduce", tensor.clone()) as tensors:
            tensor.copy_(sum(tensors[1:], start=tensors[0]))

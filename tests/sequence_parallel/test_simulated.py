from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mst_ds.sequence_parallel import SequenceGroup, run_simulated


def exchanges(group: SequenceGroup) -> tuple[list[int], list[Tensor], Tensor]:
    # Rank r sends to rank t r + t + 1 numbers, all 10 r + t.
    splits = [group.rank + other + 1 for other in range(group.size)]
    send = torch.cat([torch.full((count,), 10 * group.rank + to) for to, count in enumerate(splits)])
    received = torch.zeros_like(send)
    group.all_to_all(received, send, splits, splits)
    total = torch.tensor([1.0, group.rank])
    group.all_reduce(total)
    gathered = group.all_gather(torch.tensor([group.rank]))
    gathered[0] += 100  # each rank's own copy
    return received.tolist(), gathered, total


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_exchange(size: int) -> None:
    for rank, (received, gathered, total) in enumerate(run_simulated(exchanges, size)):
        assert received == [10 * other + rank for other in range(size) for _ in range(rank + other + 1)]
        assert [int(tensor) for tensor in gathered] == [100, *range(1, size)]
        assert total.tolist() == [size, sum(range(size))]


class _RingShift(torch.autograd.Function):
    """Sends each rank's tensor to the next rank, and in the backward its gradient back."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return group.all_gather(tensor)[group.rank - 1]

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.all_gather(grad)[(ctx.group.rank + 1) % ctx.group.size], None


def test_backwards_exchange_too() -> None:
    def function(group: SequenceGroup) -> Tensor:
        x = torch.ones(2, requires_grad=True)
        (_RingShift.apply(x, group) * (group.rank + 1)).sum().backward()
        return x.grad

    grads = run_simulated(function, 3)
    assert [grad.tolist() for grad in grads] == [[2, 2], [3, 3], [1, 1]]


def test_an_error_ends_all_ranks_and_is_raised_itself() -> None:
    ended = []

    def function(group: SequenceGroup) -> None:
        try:
            group.all_reduce(torch.zeros(1))
            if group.rank == 1:
                raise KeyError("of rank 1")
            group.all_reduce(torch.zeros(1))
        finally:
            ended.append(group.rank)

    with pytest.raises(KeyError, match="of rank 1"):
        run_simulated(function, 3)
    assert sorted(ended) == [0, 1, 2]


def test_ranks_that_exchange_differently_do_not_hang() -> None:
    def another(group: SequenceGroup) -> None:
        group.all_gather(torch.zeros(1)) if group.rank else group.all_reduce(torch.zeros(1))

    def one_more(group: SequenceGroup) -> None:
        if group.rank:
            group.all_gather(torch.zeros(1))

    with pytest.raises(RuntimeError, match="different exchanges: all_reduce, all_gather"):
        run_simulated(another, 2)
    with pytest.raises(RuntimeError, match="different exchanges: end, all_gather"):
        run_simulated(one_more, 2)

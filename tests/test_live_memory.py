"""The meter against hand counts: a peak that it misses would be a peak that no other test can find."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds.memory.live import LiveMemory

KIB = 1024


def kib(count):
    """A tensor of `count` KiB, made under the meter that is on."""
    return torch.empty(count * KIB // 4)


def test_counts_what_is_alive_and_the_most_that_was():
    with LiveMemory() as memory:
        a = kib(4)
        b = kib(8)
        assert memory.live == 12 * KIB
        del a
        assert memory.live == 8 * KIB
        kib(1)
        assert (memory.live, memory.peak) == (8 * KIB, 12 * KIB)
        memory.reset_peak()
        c = b + 1
        del b, c
    assert (memory.live, memory.peak) == (0, 16 * KIB)


def test_views_and_in_place_operations_do_not_count_twice():
    with LiveMemory() as memory:
        a = kib(4)
        row = a.view(2, -1)[0]
        a.add_(1).mul_(2)
        torch.add(row, row, out=row)
        assert memory.live == memory.peak == 4 * KIB
        del a
        assert memory.live == 4 * KIB  # held by the view
        del row
        assert memory.live == 0


def test_what_existed_before_is_not_counted():
    before, other = kib(4), kib(4)
    with LiveMemory() as memory:
        before.view(-1).add_(1)
        torch.mul(before, 2, out=other)
        assert memory.peak == 0
        after = before + 1
        assert memory.live == 4 * KIB
        del before, other, after
        assert memory.live == 0


def test_tensors_in_lists_are_seen():
    before = kib(4)
    with LiveMemory() as memory:
        made = torch._foreach_add([before, kib(1)], 1)
        assert (memory.live, memory.peak) == (5 * KIB, 6 * KIB)
        torch._foreach_zero_([before])
        before.add_(1)
        del made
        assert memory.live == 0


def test_out_that_is_resized_counts_with_its_new_size():
    ones = torch.ones(KIB)
    with LiveMemory() as memory:
        out = torch.empty(0)
        torch.add(ones, ones, out=out)
        assert memory.live == memory.peak == 4 * KIB
        del out
    assert memory.live == 0


def test_every_result_of_an_operation_counts_once():
    source = torch.randn(16, 64)
    with LiveMemory() as memory:
        values, indices = source.sort()  # fp32 and int64
        parts = values.split(4)
        assert memory.live == 16 * 64 * (4 + 8)
    del values, indices, parts
    assert memory.live == 0


def test_an_address_used_again_is_another_storage():
    with LiveMemory() as memory:
        for _ in range(100):
            kib(1)
        assert (memory.live, memory.peak) == (0, KIB)


def backward_of_exp_of_a_product():
    """Bytes held after the forward, left after the backward, and the backward's peak."""
    weight = torch.ones(64, 64, requires_grad=True)
    x = torch.ones(64, 64)
    with LiveMemory() as memory:
        loss = (weight @ x).exp().sum()
        held = memory.live
        memory.reset_peak()
        loss.backward()
        del loss
        return held, memory.live, memory.peak


def test_the_backward_is_seen_and_fake_tensors_count_the_same():
    block, scalar = 64 * 64 * 4, 4
    real = backward_of_exp_of_a_product()
    with FakeTensorMode():
        assert backward_of_exp_of_a_product() == real
    # The forward holds the result of exp. In the backward the loss and its gradient of 1 are alive, and two blocks:
    # first that result and the product's gradient, then the latter and the weight's.
    assert real == (block + scalar, block, 2 * block + 2 * scalar)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_saved_by_autograd_stay_alive(requires_grad):
    x = torch.ones(KIB, requires_grad=requires_grad)
    with LiveMemory() as memory:
        y = x.exp().sin().sum()
        # exp saves its result, which sin saves as well; without a graph both are gone.
        assert memory.live == (4 * KIB if requires_grad else 0) + 4
        del y
    assert memory.live == 0

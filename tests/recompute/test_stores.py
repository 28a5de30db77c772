"""What is kept comes back unchanged, taken once or read often; on the host it takes no memory of the device."""

import copy

import pytest
import torch
from streams import Streams

from mst_ds.memory.dry_run import host_left_out
from mst_ds.memory.live import LiveMemory
from mst_ds.recompute import DeviceStore, HostStore, KeptOnDevice, read_in_turn

SIZE = 64 * 1024  # bytes of `kept_tensor`
STORES = [DeviceStore, HostStore]
USED = "has been used: a second backward"


def kept_tensor(value=1.0):
    return torch.full((SIZE // 4,), value)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", [1, SIZE])
@pytest.mark.parametrize("is_shared", [False, True])
def test_read_often_and_taken_once(store, size, is_shared):
    tensor, part = torch.randn(size), store().begin_part()
    kept = part.keep(tensor, is_shared=is_shared)
    for _ in range(2):
        assert torch.equal(kept.read(), tensor)
    part.begin_backward()
    for _ in range(2):
        assert torch.equal(kept.read(), tensor)
    assert torch.equal(kept.take(), tensor)
    for get in (kept.take, kept.read):
        with pytest.raises(RuntimeError, match=USED):
            get()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_any_tensor_comes_back_as_it_was(store, dtype):
    whole = torch.arange(SIZE).view(64, -1).to(dtype)
    with_gaps = whole[3:, ::2]
    wide = whole[:, :1].expand(-1, 1024)
    for tensor in (whole, whole.t(), with_gaps, with_gaps.t(), wide, wide.t(), whole[None].transpose(1, 2)):
        kept = store().begin_part().keep(tensor)
        for found in (kept.read(), kept.take()):
            assert torch.equal(found, tensor)
            assert (found.dtype, found.device) == (tensor.dtype, tensor.device)


@pytest.mark.parametrize("store", STORES)
def test_what_is_taken_is_no_part_of_a_graph(store):
    tensor = torch.randn(SIZE, requires_grad=True) * 2
    kept = store().begin_part().keep(tensor)
    assert not kept.read().requires_grad
    assert not kept.take().requires_grad


def test_transposed_tensors_keep_their_strides_on_the_host():
    tensor = torch.randn(128, 64).t()
    assert HostStore().begin_part().keep(tensor).take().stride() == tensor.stride()


def test_small_tensors_stay_on_the_device():
    part = HostStore().begin_part()
    assert isinstance(part.keep(torch.ones(127)), KeptOnDevice)
    assert not isinstance(part.keep(torch.ones(128)), KeptOnDevice)


# On the CPU, and on a device whose copies run beside what it computes.
DEVICES = [pytest.param(lambda device: None, id="cpu"), pytest.param(lambda device: Streams(), id="streams")]


@pytest.mark.parametrize("device_module", DEVICES)
def test_the_device_holds_two_parts_in_the_forward_and_in_the_backward(device_module):
    store = HostStore(device_module)
    with LiveMemory() as memory, host_left_out(memory):
        store.begin_forward()
        parts = []
        for index in range(6):
            part = store.begin_part()
            own = part.keep(kept_tensor(float(index)))
            parts.append((part, own, part.keep(kept_tensor(), is_shared=True)))
            assert memory.live <= 2 * 2 * SIZE, index
        for index, (part, kept, _) in reversed(list(enumerate(parts))):
            part.begin_backward()
            # Its own, and that of the part before it, which is fetched while this one is computed; nothing shared.
            assert memory.live == min(index + 1, 2) * SIZE, index
            found = kept.take()
            assert found[0] == index
            del found, kept
            assert memory.live == min(index, 1) * SIZE, index
            parts.pop()
        assert memory.live == 0


@pytest.mark.parametrize("dim", [0, 1])
def test_the_device_holds_nothing_of_what_a_chunk_was_cut_from(dim):
    store = HostStore()
    with LiveMemory() as memory, host_left_out(memory):
        whole = kept_tensor().view(64, -1)
        kept = [store.begin_part().keep(chunk) for chunk in whole.chunk(4, dim)]
        del whole
        # The last two chunks, which may be on their way.
        assert memory.live == 2 * SIZE // 4
        del kept


@pytest.mark.parametrize("device_module", DEVICES)
def test_what_is_read_in_turn_is_on_the_device_with_the_next(device_module):
    store, count = HostStore(device_module), 4
    with LiveMemory() as memory, host_left_out(memory):
        kept = [
            tuple(part.keep(kept_tensor(value), is_shared=True) for value in (float(index), -float(index)))
            for index, part in enumerate(store.begin_part() for _ in range(count))
        ]
        store.begin_forward()  # all copies have left
        for until in (count, 2):
            assert memory.live == 0
            reads = read_in_turn(kept[:until])
            assert memory.live == 2 * SIZE
            for index in range(until):
                key, value = next(reads)
                assert (key[0], value[0]) == (index, -index)
                assert memory.live == min(until - index, 2) * 2 * SIZE, index
                del key, value
                assert memory.live == min(until - index - 1, 1) * 2 * SIZE, index


@pytest.mark.parametrize("device_module", DEVICES)
@pytest.mark.parametrize("asked_for", [0, 1, 2])
def test_nothing_is_left_of_reads_that_end_early(device_module, asked_for):
    store = HostStore(device_module)
    with LiveMemory() as memory, host_left_out(memory):
        kept = [(store.begin_part().keep(kept_tensor(), is_shared=True),) for _ in range(4)]
        store.begin_forward()
        reads = read_in_turn(kept)
        for _ in range(asked_for):
            next(reads)
        assert memory.live == SIZE
        del reads
        assert memory.live == 0


@pytest.mark.parametrize("store", STORES)
def test_reads_in_turn_of_nothing(store):
    kept = store().begin_part().keep(kept_tensor(), is_shared=True)
    assert list(read_in_turn([])) == []
    assert [len(found) for found in read_in_turn([(), (kept,), (), (kept, kept)])] == [0, 1, 0, 2]


def test_what_stays_on_the_device_is_read_without_copies():
    tensor = kept_tensor()
    kept = DeviceStore().begin_part().keep(tensor, is_shared=True)
    assert [found.data_ptr() for (found,) in read_in_turn([(kept,)] * 3)] == [tensor.data_ptr()] * 3


def test_what_the_last_part_keeps_is_read_before_it_has_left():
    store = HostStore()
    with LiveMemory() as memory, host_left_out(memory):
        kept = store.begin_part().keep(kept_tensor(3.0), is_shared=True)
        found = kept.read()
        # The copy alone: what was kept is freed, since its copy was done before.
        assert memory.live == SIZE
        assert found[0] == 3


def test_host_memory_is_freed_as_it_is_fetched():
    store = HostStore()
    with LiveMemory() as memory:
        kept = [store.begin_part().keep(kept_tensor(float(index))) for index in range(4)]
        store.begin_forward()  # all copies have left
        assert memory.live == 4 * SIZE
        for index in (3, 2, 1, 0):
            kept.pop().take()
            assert memory.live == index * SIZE


@pytest.mark.parametrize("is_shared", [False, True])
def test_host_memory_is_freed_as_nobody_keeps_it_longer(is_shared):
    store = HostStore()
    with LiveMemory() as memory:
        part = store.begin_part()
        kept = [part.keep(kept_tensor(), is_shared=is_shared) for _ in range(3)]
        store.begin_forward()
        kept[0].read()
        while kept:
            assert memory.live == len(kept) * SIZE
            kept.pop()
        part.begin_backward()
        assert memory.live == 0


def test_parts_that_keep_nothing_leave_nothing():
    store = HostStore()
    with LiveMemory() as memory, host_left_out(memory), torch.no_grad():
        first, *rest = (store.begin_part() for _ in range(4))
        last = rest.pop()
        kept = last.keep(kept_tensor())
        del rest
        for part in (last, first):
            part.begin_backward()
        kept.take()
        assert memory.live == 0


def test_a_forward_without_backward_leaves_nothing():
    store = HostStore()
    with LiveMemory() as memory:
        for _ in range(3):
            store.begin_forward()
            kept = [store.begin_part().keep(kept_tensor()) for _ in range(3)]
            del kept
        store.begin_forward()
        assert memory.live == 0


def test_a_part_of_an_earlier_forward_is_not_fetched():
    store = HostStore()
    with LiveMemory() as memory, host_left_out(memory):
        first = [(part, part.keep(kept_tensor())) for part in (store.begin_part() for _ in range(2))]
        store.begin_forward()
        part = store.begin_part()
        kept = part.keep(kept_tensor())
        part.begin_backward()
        kept.take()
        del kept
        assert memory.live == 0
        del first


def test_a_copy_shares_nothing():
    store = HostStore()
    kept = store.begin_part().keep(kept_tensor(3.0))
    other = copy.deepcopy(store)
    other.begin_forward()
    assert other._leaving is not store._leaving
    assert kept.take()[0] == 3


@pytest.mark.parametrize("get", [lambda kept: kept.take(), lambda kept: kept.read(), lambda kept: kept.begin_read()()])
@pytest.mark.parametrize("store", STORES)
def test_what_is_written_to_in_place_is_not_given(store, get):
    part, tensor = store().begin_part(), kept_tensor()
    kept = part.keep(tensor, is_shared=True)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="has been written to in place after its forward"):
        get(kept)

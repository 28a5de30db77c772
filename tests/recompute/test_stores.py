"""What is kept comes back once, unchanged; on the host it takes no memory of the device."""

import copy

import pytest
import torch

from mst_ds.memory.dry_run import host_left_out
from mst_ds.memory.live import LiveMemory
from mst_ds.recompute import DeviceStore, HostStore, KeptOnDevice

SIZE = 64 * 1024  # bytes of `kept_tensor`
STORES = [DeviceStore, HostStore]
USED = "has been used: a second backward"


def kept_tensor(value=1.0):
    return torch.full((SIZE // 4,), value)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("size", [1, SIZE])
def test_taken_once(store, size):
    tensor = torch.randn(size)
    kept = store().begin_layer().keep(tensor)
    assert torch.equal(kept.take(), tensor)
    with pytest.raises(RuntimeError, match=USED):
        kept.take()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool], ids=str)
def test_any_tensor_comes_back_as_it_was(store, dtype):
    whole = torch.arange(SIZE).view(64, -1).to(dtype)
    with_gaps = whole[3:, ::2]
    wide = whole[:, :1].expand(-1, 1024)
    for tensor in (whole, whole.t(), with_gaps, with_gaps.t(), wide, wide.t(), whole[None].transpose(1, 2)):
        kept = store().begin_layer().keep(tensor)
        found = kept.take()
        assert torch.equal(found, tensor)
        assert (found.dtype, found.device) == (tensor.dtype, tensor.device)


@pytest.mark.parametrize("store", STORES)
def test_what_is_taken_is_no_part_of_a_graph(store):
    tensor = torch.randn(SIZE, requires_grad=True) * 2
    assert not store().begin_layer().keep(tensor).take().requires_grad


def test_transposed_tensors_keep_their_strides_on_the_host():
    tensor = torch.randn(128, 64).t()
    assert HostStore().begin_layer().keep(tensor).take().stride() == tensor.stride()


def test_small_tensors_stay_on_the_device():
    layer = HostStore().begin_layer()
    assert isinstance(layer.keep(torch.ones(1023)), KeptOnDevice)
    assert not isinstance(layer.keep(torch.ones(1024)), KeptOnDevice)


def test_the_device_holds_two_layers_in_the_forward_and_in_the_backward():
    store = HostStore()
    with LiveMemory() as memory, host_left_out(memory):
        store.begin_forward()
        layers = []
        for index in range(6):
            layer = store.begin_layer()
            layers.append((layer, layer.keep(kept_tensor(float(index)))))
            assert memory.live <= 2 * SIZE, index
        for index, (layer, kept) in reversed(list(enumerate(layers))):
            layer.begin_backward()
            # Its own, and that of the layer before it, which is fetched while this one is computed.
            assert memory.live == min(index + 1, 2) * SIZE, index
            found = kept.take()
            assert found[0] == index
            del found, kept
            assert memory.live == min(index, 1) * SIZE, index
            layers.pop()
        assert memory.live == 0


def test_host_memory_is_freed_as_it_is_fetched():
    store = HostStore()
    with LiveMemory() as memory:
        kept = [store.begin_layer().keep(kept_tensor(float(index))) for index in range(4)]
        store.begin_forward()  # all copies have left
        assert memory.live == 4 * SIZE
        for index in (3, 2, 1, 0):
            kept.pop().take()
            assert memory.live == index * SIZE


def test_a_forward_without_backward_leaves_nothing():
    store = HostStore()
    with LiveMemory() as memory:
        for _ in range(3):
            store.begin_forward()
            kept = [store.begin_layer().keep(kept_tensor()) for _ in range(3)]
            del kept
        store.begin_forward()
        assert memory.live == 0


def test_a_layer_of_an_earlier_forward_is_not_fetched():
    store = HostStore()
    with LiveMemory() as memory, host_left_out(memory):
        first = [(layer, layer.keep(kept_tensor())) for layer in (store.begin_layer() for _ in range(2))]
        store.begin_forward()
        layer = store.begin_layer()
        kept = layer.keep(kept_tensor())
        layer.begin_backward()
        kept.take()
        del kept
        assert memory.live == 0
        del first


def test_a_copy_shares_nothing():
    store = HostStore()
    kept = store.begin_layer().keep(kept_tensor(3.0))
    other = copy.deepcopy(store)
    other.begin_forward()
    assert other._leaving is not store._leaving
    assert kept.take()[0] == 3


@pytest.mark.parametrize("store", STORES)
def test_what_is_written_to_in_place_is_not_taken(store):
    layer, tensor = store().begin_layer(), kept_tensor()
    kept = layer.keep(tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match="has been written to in place after its forward"):
        kept.take()

"""Copies to the host and back run beside the computation: which waits order them with it."""

import gc
import random

import pytest
import torch
from streams import Streams
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds.geometry import host_bytes, host_slabs
from mst_ds.recompute import HostStore

LAYERS = 5
COUNT = 4096  # elements of what a layer keeps


def forward(store, count=COUNT):
    """Layers, each with the tensor that it computes and keeps, and what that was."""
    store.begin_forward()
    layers = []
    for index in range(LAYERS):
        layer = store.begin_layer()
        tensor = torch.full((count,), float(index)) * 2
        layers.append((layer, layer.keep(tensor)))
        del tensor  # its memory is free for what is computed next
    return layers


def backward(layers, until=0):
    while len(layers) > until:
        layer, kept = layers.pop()
        layer.begin_backward()
        assert (kept.take() * 3)[0] == 6 * len(layers)


def run(streams, *steps):
    with streams:
        store = HostStore(lambda device: streams)
        for step in steps:
            step(store)
        del store


def whole_step(store):
    backward(forward(store))


def ends_early(store):
    """What has been fetched for the layer before is dropped, and its memory used again."""
    layers = forward(store)
    backward(layers, until=3)
    del layers
    torch.zeros(COUNT)


def without_backward(store):
    forward(store)


STEPS = {
    "two steps": (whole_step, whole_step),
    "backward ends early": (whole_step, ends_early, whole_step),
    "no backward": (without_backward, whole_step, without_backward),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_no_memory_is_used_before_the_streams_are_done_with_it(steps):
    streams = Streams()
    run(streams, *steps)
    assert streams.races == []


@pytest.mark.parametrize("wait", ["wait_stream", "wait_event"])
def test_a_wait_that_is_missing_is_seen(wait):
    """The copies wait for what is computed, and what is computed for the copies."""
    streams = Streams(deaf_to=[wait])
    run(streams, whole_step)
    assert streams.races


def test_what_is_fetched_and_dropped_is_seen_without_its_wait():
    streams = Streams()
    with streams:
        store = HostStore(lambda device: streams)
        layers = forward(store)
        backward(layers, until=4)
        streams.deaf_to = ["wait_event"]
        del layers
    assert ("aten::copy_", "free") in streams.races


def test_the_computation_does_not_wait_for_copies_that_it_does_not_need():
    streams = Streams()
    with streams:
        store = HostStore(lambda device: streams)
        layers = forward(store)

        def copies_waited_for():
            return sum(number for stream, number in streams.computing.seen.items() if stream is not streams.computing)

        # Of the last two layers they may still be on their way.
        assert copies_waited_for() == LAYERS - 2
        layer, kept = layers.pop()
        layer.begin_backward()
        kept.take()
        # Both have left and the last one's tensor is back; that of the one before is on its way.
        assert copies_waited_for() == LAYERS + 1


PIECE = 2**25


@pytest.mark.parametrize("copy", [1, 2, 2 * LAYERS, 2 * LAYERS + 1, 2 * LAYERS + 2, 4 * LAYERS])
def test_a_copy_that_is_interrupted_leaves_no_race(copy):
    """Of a tensor in two pieces the first may be on its way."""
    streams = Streams(fails_at=copy)
    with pytest.raises(KeyboardInterrupt), FakeTensorMode(), streams:
        without_values(HostStore(lambda device: streams), PIECE + 4)
    gc.collect()
    assert streams.races == []


def without_values(store, size):
    """A step in which each layer keeps a tensor of so many bytes."""
    layers = forward(store, size // 4)
    while layers:
        layer, kept = layers.pop()
        layer.begin_backward()
        kept.take()


# Below a page, at powers of two and beside them; of one piece, of several, with a rest.
SIZES = [4096, 4100, 5000, 2**16, 2**16 + 4, 10**6, PIECE, PIECE + 4, 3 * PIECE, 10**9]


def pinned_in(*sizes):
    """Bytes of the host after steps with tensors of these sizes."""
    streams = Streams()
    with FakeTensorMode(), streams:
        store = HostStore(lambda device: streams)
        for size in sizes:
            without_values(store, size)
    return streams.on_host


@pytest.mark.parametrize("size", SIZES)
def test_the_host_has_as_many_bytes_as_are_planned(size):
    """In the second step the pieces of the first are used again, though the copies from them may not be done."""
    assert pinned_in(size, size) == host_slabs(LAYERS * host_bytes(size))


@pytest.mark.parametrize("seed", range(4))
def test_sequences_of_any_lengths_take_no_more_than_the_longest_in_pieces(seed):
    draw = random.Random(seed)
    sizes = [draw.randrange(4096, 4 * PIECE) // 4 * 4 for _ in range(8)]
    assert pinned_in(*sizes) == host_slabs(LAYERS * max(map(host_bytes, sizes)))

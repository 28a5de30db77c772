"""Copies to the host and back run beside the computation: which waits order them with it."""

import gc
import random

import pytest
import torch
from streams import Streams
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_ds.geometry import host_bytes, host_slabs
from mst_ds.recompute import HostStore, read_in_turn

PARTS = 5
COUNT = 4096  # elements of what a part keeps


def forward(store, count=COUNT, is_shared=False):
    """Parts, each with the tensor that it computes and keeps."""
    store.begin_forward()
    parts = []
    for index in range(PARTS):
        part = store.begin_part()
        tensor = torch.full((count,), float(index)) * 2
        parts.append((part, part.keep(tensor, is_shared=is_shared)))
        del tensor  # its memory is free for what is computed next
    return parts


def backward(parts, until=0):
    while len(parts) > until:
        part, kept = parts.pop()
        part.begin_backward()
        assert (kept.take() * 3)[0] == 6 * len(parts)


def read_all(parts):
    reads = read_in_turn([(kept,) for _, kept in parts])
    for index in range(len(parts)):
        (tensor,) = next(reads)
        assert (tensor * 3)[0] == 6 * index
        del tensor


def run(streams, *steps):
    with streams:
        store = HostStore(lambda device: streams)
        for step in steps:
            step(store)
        del store


def whole_step(store):
    backward(forward(store))


def ends_early(store):
    """What has been fetched for the part before is dropped, and its memory used again."""
    parts = forward(store)
    backward(parts, until=3)
    del parts
    torch.zeros(COUNT)


def shared_step(store):
    """Chunks of a layer, each of which reads what those before it keep, in its forward and in its backward."""
    store.begin_forward()
    own, shared = [], []
    for index in range(PARTS):
        part = store.begin_part()
        for parts in (own, shared):
            tensor = torch.full((COUNT,), float(index)) * 2
            parts.append((part, part.keep(tensor, is_shared=parts is shared)))
            del tensor
        read_all(shared)
    for until in reversed(range(PARTS)):
        part, kept = own[until]
        part.begin_backward()
        assert (kept.read() * 3)[0] == 6 * until
        del part, kept
        backward(own, until)
        read_all(shared)
        shared.pop()


def reads_end_early(store):
    """What is on its way is dropped, and its memory used again."""
    kept = [(kept,) for _, kept in forward(store, is_shared=True)]
    for asked_for in range(3):
        reads = read_in_turn(kept)
        for _ in range(asked_for):
            next(reads)
        del reads
        torch.zeros(COUNT)
    # Pieces are another's while copies from them are on their way.
    reads = read_in_turn(kept)
    kept.clear()
    del reads
    forward(store)


def without_backward(store):
    forward(store)


STEPS = {
    "two steps": (whole_step, whole_step),
    "backward ends early": (whole_step, ends_early, whole_step),
    "no backward": (without_backward, whole_step, without_backward),
    "shared": (shared_step, shared_step),
    "reads end early": (shared_step, reads_end_early, shared_step),
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
        parts = forward(store)
        backward(parts, until=4)
        streams.deaf_to = ["wait_event"]
        del parts
    assert ("aten::copy_", "free") in streams.races


@pytest.mark.parametrize(
    ("wait", "race"),
    [("wait_stream", ("aten::empty_like", "aten::copy_")), ("wait_event", ("aten::copy_", "aten::mul"))],
)
def test_a_wait_of_reads_that_is_missing_is_seen(wait, race):
    streams = Streams()
    with streams:
        store = HostStore(lambda device: streams)
        parts = forward(store, is_shared=True)
        store.begin_forward()  # all copies have left
        streams.deaf_to = [wait]
        read_all(parts)
    assert race in streams.races


@pytest.mark.parametrize("asked_for", [0, 1, 2])
def test_reads_that_end_early_are_seen_without_their_wait(asked_for):
    streams = Streams()
    with streams:
        store = HostStore(lambda device: streams)
        parts = forward(store, is_shared=True)
        store.begin_forward()
        reads = read_in_turn([(kept,) for _, kept in parts])
        for _ in range(asked_for):
            next(reads)
        streams.deaf_to = ["wait_event"]
        del reads
    assert streams.races == [("aten::copy_", "free")]


def copies_waited_for(streams):
    return sum(number for stream, number in streams.computing.seen.items() if stream is not streams.computing)


def test_the_computation_does_not_wait_for_copies_that_it_does_not_need():
    streams = Streams()
    with streams:
        store = HostStore(lambda device: streams)
        parts = forward(store)
        # Of the last two parts they may still be on their way.
        assert copies_waited_for(streams) == PARTS - 2
        part, kept = parts.pop()
        part.begin_backward()
        kept.take()
        # Both have left and the last one's tensor is back; that of the one before is on its way.
        assert copies_waited_for(streams) == PARTS + 1


def test_the_computation_does_not_wait_for_what_is_read_next():
    streams = Streams()
    with streams:
        store = HostStore(lambda device: streams)
        reads = read_in_turn([(kept,) for _, kept in reversed(forward(store, is_shared=True))])
        # The first may be on its way to the host still.
        assert copies_waited_for(streams) == PARTS - 2
        for index in range(PARTS):
            next(reads)
            assert copies_waited_for(streams) == PARTS + index + 1


PIECE = 2**25


def without_values(store, size):
    """A step in which each part keeps a tensor of so many bytes."""
    parts = forward(store, size // 4)
    while parts:
        part, kept = parts.pop()
        part.begin_backward()
        kept.take()


def shared_without_values(store, size):
    """A step in which each part keeps a tensor of so many bytes, which the parts after it read."""
    parts = forward(store, size // 4, is_shared=True)
    while parts:
        for _ in read_in_turn([(kept,) for _, kept in parts]):
            pass
        parts.pop()


@pytest.mark.parametrize("copy", [1, 2, 2 * PARTS, 2 * PARTS + 1, 2 * PARTS + 2, 2 * PARTS + 4, 4 * PARTS])
@pytest.mark.parametrize("step", [without_values, shared_without_values])
def test_a_copy_that_is_interrupted_leaves_no_race(step, copy):
    """Of a tensor in two pieces the first may be on its way."""
    streams = Streams(fails_at=copy)
    with pytest.raises(KeyboardInterrupt), FakeTensorMode(), streams:
        step(HostStore(lambda device: streams), PIECE + 4)
    gc.collect()
    assert streams.races == []


# Below a page, at powers of two and beside them; of one piece, of several, with a rest.
SIZES = [4096, 4100, 5000, 2**16, 2**16 + 4, 10**6, PIECE, PIECE + 4, 3 * PIECE, 10**9]


def pinned_in(*sizes, step=without_values):
    """Bytes of the host after steps with tensors of these sizes."""
    streams = Streams()
    with FakeTensorMode(), streams:
        store = HostStore(lambda device: streams)
        for size in sizes:
            step(store, size)
    return streams.on_host


@pytest.mark.parametrize("size", SIZES)
def test_the_host_has_as_many_bytes_as_are_planned(size):
    """In the second step the pieces of the first are used again, though the copies from them may not be done."""
    assert pinned_in(size, size) == host_slabs(PARTS * host_bytes(size))


def test_the_host_has_no_more_bytes_for_what_is_read_often():
    size = PIECE + 4
    assert pinned_in(size, size, step=shared_without_values) == host_slabs(PARTS * host_bytes(size))


@pytest.mark.parametrize("seed", range(4))
def test_sequences_of_any_lengths_take_no_more_than_the_longest_in_pieces(seed):
    draw = random.Random(seed)
    sizes = [draw.randrange(4096, 4 * PIECE) // 4 * 4 for _ in range(8)]
    assert pinned_in(*sizes) == host_slabs(PARTS * max(map(host_bytes, sizes)))

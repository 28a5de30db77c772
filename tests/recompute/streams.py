"""A device on the CPU whose streams run in any order that their waits allow: what may meet at one memory is a race."""

import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Stream:
    """Attributes: seen, the last operation of each stream that comes before what this one does next."""

    def __init__(self, streams):
        self._streams, self.seen = streams, {}

    def record_event(self):
        return dict(self.seen)

    def wait_event(self, event):
        if "wait_event" not in self._streams.deaf_to:
            self._after(event)

    def wait_stream(self, stream):
        if "wait_stream" not in self._streams.deaf_to:
            self._after(stream.seen)

    def _after(self, seen):
        self.seen = {stream: max(self.seen.get(stream, 0), seen.get(stream, 0)) for stream in self.seen | seen}


class Streams(TorchDispatchMode):
    """Stands for a module such as torch.cuda, and watches operations while it is entered.

    Memory of the device is allocated and freed in the order of the computing stream, as torch's allocator does: what
    is freed may be another tensor's for that stream's next operation. Bytes (uint8) are memory of the host, which
    torch's allocator keeps until all streams are done with it.

    Args:
        deaf_to: waits that have no effect, "wait_stream" or "wait_event".
        fails_at: the copy, from 1 on, that raises KeyboardInterrupt in place of being done.

    Attributes:
        races: pairs of operations at the same memory, one of which writes, that no wait orders.
        on_host: bytes of the host that were ever allocated.
        computing: the stream of all that is computed.
    """

    def __init__(self, *, deaf_to=(), fails_at=0):
        super().__init__()
        self.deaf_to, self._fails_at = deaf_to, fails_at
        self.races, self.on_host = [], 0
        self.computing = self._current = _Stream(self)
        self._copies = 0
        self._accesses = {}  # of each storage: (operation, stream, number on the stream, whether it writes)
        self._alive = {}

    def Stream(self, device):
        return _Stream(self)

    def current_stream(self, device):
        return self._current

    @contextmanager
    def stream(self, stream):
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten.copy_.default:
            self._copies += 1
            if self._copies == self._fails_at:
                raise KeyboardInterrupt
        result = func(*args, **kwargs)
        is_view = any(returned.alias_info and not returned.alias_info.is_write for returned in func._schema.returns)
        if is_view or func.namespace == "prim":
            return result
        stream, name = self._current, func._schema.name
        stream.seen[stream] = stream.seen.get(stream, 0) + 1
        written = {id(storage) for storage in _storages(result)}
        is_on_host = func is torch.ops.aten.empty.memory_format and result.dtype is torch.uint8
        for storage in {id(each): each for each in _storages((args, kwargs, result))}.values():
            if id(storage) not in self._alive:
                self._watch(storage, is_on_host)
            self._access(id(storage), name, id(storage) in written)
        return result

    def _watch(self, storage, is_on_host):
        key = id(storage)
        self._accesses[key] = []
        self._alive[key] = weakref.ref(storage, lambda _: self._freed(key, is_on_host))
        if is_on_host:
            self.on_host += storage.nbytes()

    def _access(self, key, name, writes):
        stream = self._current
        self._race(key, stream, name, writes)
        self._accesses[key].append((name, stream, stream.seen[stream], writes))

    def _freed(self, key, is_on_host):
        del self._alive[key]
        if not is_on_host:
            self._race(key, self.computing, "free", writes=True)
        del self._accesses[key]

    def _race(self, key, stream, name, writes):
        for other, other_stream, number, other_writes in self._accesses[key]:
            if (writes or other_writes) and stream.seen.get(other_stream, 0) < number:
                self.races.append((other, name))


def _storages(values):
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta")
    return [tensor.untyped_storage() for tensor in tensors]

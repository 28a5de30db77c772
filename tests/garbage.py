"""The garbage collector held off, so that what is alive does not hang on when it comes."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collector() -> Iterator[None]:
    """What lies in circles is collected before this and at its end, and not by chance within, where it counts as
    alive."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()

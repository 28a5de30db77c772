"""Times of what runs on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.measure import synchronize


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    """The mean of several calls, after one that does not count; the device is waited for once."""
    run()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def host_and_device_seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Of one call: until the host has given the device all it has to do, and until that is done."""
    synchronize(device)
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    synchronize(device)
    return host, time.perf_counter() - start

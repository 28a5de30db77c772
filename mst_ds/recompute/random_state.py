"""What a computation runs under: the states of the random number generators that it draws from, and autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class RandomState:
    """The states of the CPU's generator and of the device's own, as they are when this is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        has_generator = device.type not in ("cpu", "meta")
        self._of_device = torch.get_device_module(device).get_rng_state(device) if has_generator else None

    def restore(self) -> None:
        """Set the generators to these states."""
        torch.set_rng_state(self._cpu)
        if self._of_device is not None:
            torch.get_device_module(self._device).set_rng_state(self._of_device, self._device)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within, the generators begin at these states; afterwards they are as before."""
        device = self._device
        forked = (
            torch.random.fork_rng([])
            if self._of_device is None
            else torch.random.fork_rng([device], device_type=device.type)
        )
        with forked:
            self.restore()
            yield


class Conditions:
    """What a forward ran under and its recompute needs again: the states of the random generators, and autocast."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.random_state = RandomState(device)
        self.autocast_enabled = torch.is_autocast_enabled(device.type)
        self.autocast_dtype = torch.get_autocast_dtype(device.type)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within, all is as it was; random states are put back afterwards."""
        autocast = torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast_enabled)
        with self.random_state.restored(), autocast:
            yield

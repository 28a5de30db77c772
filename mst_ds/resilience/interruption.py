"""Asks a run to stop: by SIGTERM, as schedulers and users do, or by SIGUSR1, as SLURM does some time before the end."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interruption:
    """Within its context the signals are noted instead of ending the process. `signal_name` is None until one comes.

    Before and after it SIGTERM ends the process, and SIGUSR1 waits, as the training command has asked for.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        for each in _SIGNALS:
            self._handlers[each] = signal.signal(each, self._note)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return self

    def __exit__(self, *_: object) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        for each, handler in self._handlers.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


def any_rank(flags: tuple[bool, ...], device: torch.device) -> tuple[bool, ...]:
    """Each flag, true where it is on any rank. A collective call: who stopped alone would leave the others waiting."""
    counts = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return tuple(bool(count) for count in counts.tolist())

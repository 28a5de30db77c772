"""When a run makes a checkpoint: every so many steps or minutes, and when it is asked to stop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch.distributed as dist

from mst_ds.checkpoint import CheckpointWriter
from mst_ds.data import ShardedLoader
from mst_ds.resilience.interruption import Interruption, any_rank

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Saver:
    """Saves after the steps for which that is due, on all ranks alike.

    Args:
        batches: whose place in the data is saved.
        interruption: a run that is asked to stop is saved whatever else is set.
        max_steps, save_steps, save_minutes: the flags of these names.
    """

    def __init__(
        self,
        engine: DeepSpeedEngine,
        batches: ShardedLoader,
        writer: CheckpointWriter,
        interruption: Interruption,
        *,
        max_steps: int,
        save_steps: int = 0,
        save_minutes: float = 0.0,
    ) -> None:
        self._engine, self._batches, self._writer, self._interruption = engine, batches, writer, interruption
        self._max_steps, self._save_steps, self._save_minutes = max_steps, save_steps, save_minutes
        self._last_save = time.monotonic()

    def after_step(self, step: int, eval_loss: float | None) -> bool:
        """Whether to stop after `step`; `eval_loss`: its loss in an evaluation, if there was one. A collective call."""
        signal_name = self._interruption.signal_name
        minutes = (time.monotonic() - self._last_save) / 60
        is_late = 0 < self._save_minutes <= minutes
        # Clocks and signals differ from rank to rank.
        stops, is_late = any_rank((signal_name is not None, is_late), self._engine.device)
        is_due = self._save_steps > 0 and step % self._save_steps == 0
        is_last = step == self._max_steps and (self._save_steps > 0 or self._save_minutes > 0)
        if stops or is_late or is_last or is_due:
            self._writer.save(self._engine, step=step, data=self._batches.state_dict(), eval_loss=eval_loss)
            self._last_save = time.monotonic()
        if signal_name is not None and step < self._max_steps:
            rank = dist.get_rank()
            print(f"stopped after step {step} by {signal_name} on rank {rank}; --resume auto goes on", flush=True)
        return stops

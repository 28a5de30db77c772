"""When a run makes a checkpoint: every so many steps or minutes, and when it is asked to stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from mst_ds.checkpoint import save_checkpoint
from mst_ds.data import ShardedLoader
from mst_ds.engine import Run
from mst_ds.resilience.interruption import Interruption, any_rank

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


class Saver:
    """Saves after the steps for which that is due, on all ranks alike.

    Args:
        batches: whose place in the data is saved.
        folder: of the checkpoints.
        interruption: a run that is asked to stop is saved whatever else is set.
    """

    def __init__(
        self, run: Run, engine: DeepSpeedEngine, batches: ShardedLoader, folder: Path, interruption: Interruption
    ) -> None:
        self._run, self._engine, self._batches, self._folder = run, engine, batches, folder
        self._interruption = interruption
        self._last_save = time.monotonic()

    def after_step(self, step: int) -> bool:
        """Whether to stop after `step`. A collective call."""
        config = self._run.config
        signal_name = self._interruption.signal_name
        minutes = (time.monotonic() - self._last_save) / 60
        # Clocks and signals differ from rank to rank.
        stops, is_late = any_rank((signal_name is not None, 0 < config.save_minutes <= minutes), self._engine.device)
        is_last = config.saves and step == config.max_steps
        if stops or is_late or is_last or (config.save_steps and step % config.save_steps == 0):
            self._save(step)
        if signal_name is not None and step < config.max_steps:
            rank = self._run.launch.rank
            print(f"stopped after step {step} by {signal_name} on rank {rank}; --resume auto goes on", flush=True)
        return stops

    def _save(self, step: int) -> None:
        save_checkpoint(
            self._engine,
            self._folder,
            step=step,
            keep=self._run.config.save_total_limit,
            identity=self._run.identity,
            data=self._batches.state_dict(),
            tokenizer=self._run.data.tokenizer,
            source=self._run.config.model,
        )
        self._last_save = time.monotonic()

"""Train: deepspeed launch/train.py --ds_config ds_configs/zero3_mst.json [flags]; --help lists the flags."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mst_ds.config import TrainConfig, parse_train_config

if TYPE_CHECKING:
    from mst_ds.engine import Run

_SECONDS_FOR_THE_FIRST_RANK = 10.0


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 2, and one line on stderr, for a request that cannot run."""
    try:
        config = parse_train_config(argv)
        # From here on imports take seconds; a mistyped flag has been answered already.
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        from mst_ds.engine import Launch, prepare

        run = prepare(config, Launch.from_environment())
        folder = _output_dir(config)
        if run.launch.rank == 0:
            _make(folder)
    except ValueError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # One line a node, not one a rank: the launcher ends this process when the first rank has spoken. Ending
            # sooner would have the first rank killed before it could; still here, the error is this rank's alone.
            time.sleep(_SECONDS_FOR_THE_FIRST_RANK)
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    from mst_ds.out_of_memory import OutOfMemoryError, explanation

    try:
        _train(run, folder)
    except OutOfMemoryError as error:
        # Not after another collective: the others wait in theirs until the launcher ends them, because this rank ended.
        print(f"train.py: error: {explanation(error, run.plan)}", file=sys.stderr, flush=True)
        os._exit(1)
    return 0


def _train(run: Run, folder: Path) -> None:
    import deepspeed
    import torch.distributed as dist
    from rich.console import Console

    from mst_ds.checkpoint import export_model
    from mst_ds.data import ShardedLoader, eval_batches
    from mst_ds.engine import build_engine, meet
    from mst_ds.loop import train
    from mst_ds.metrics import MetricsWriter, peak_flops
    from mst_ds.model_shape import ModelShape, flops_per_token
    from mst_ds.planner import plan_table

    run = meet(run)
    config, plan, data, launch = run.config, run.plan, run.data, run.launch
    if launch.rank == 0:
        Console().print(plan_table(plan))
    engine = build_engine(run)
    flops = peak_flops(engine.device, run.dtype)
    metrics = MetricsWriter(
        folder,
        max_steps=config.max_steps,
        rank=launch.rank,
        flops_per_token=flops_per_token(ModelShape.from_config(run.model_config), config.seq_len),
        peak_flops=None if flops is None else flops * launch.world_size,
    )
    batch_size = plan.micro_batch_size
    held_out = None
    if data.held_out is not None:
        held_out = functools.partial(eval_batches, data.held_out, plan.topology, micro_batch_size=batch_size)
    with metrics:
        train(
            engine,
            plan,
            ShardedLoader(data.train, plan.topology, micro_batch_size=batch_size, seed=config.seed),
            metrics,
            max_steps=config.max_steps,
            eval_steps=config.eval_steps,
            held_out=held_out,
        )
        export_model(engine, data.tokenizer, folder / "model")
        metrics.write_summary({"plan": dataclasses.asdict(plan), "ds_config": run.ds_config})
    if launch.rank == 0:
        print(f"Done: {folder / 'metrics.jsonl'}, {folder / 'summary.json'} and the model in {folder / 'model'}")
    engine.destroy()
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()


def _output_dir(config: TrainConfig) -> Path:
    return Path(config.output_dir or f"runs/{datetime.now():%Y-%m-%d_%H-%M-%S}").expanduser()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output_dir {str(folder)!r} cannot be made: {error.strerror}") from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

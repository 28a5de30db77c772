"""Train: deepspeed --module mst_ds.commands.train --ds_config zero3_mst.json [flags]; --help lists the flags."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mst_ds.command_line.entry_point import (
    REQUEST_ERRORS,
    RequestError,
    console,
    one_line,
    run_command,
    run_on_without_output,
    say,
)
from mst_ds.command_line.exit_protocol import EXIT_FAILED, EXIT_REFUSED, EXIT_STOPPED, TRAIN_COMMAND, error_line
from mst_ds.config_parser import parse_train_config
from mst_ds.dataset_files import look_at_datasets
from mst_ds.result_flags import TENSORBOARD

if TYPE_CHECKING:
    import torch
    from deepspeed import DeepSpeedEngine

    from mst_ds.data import EvalLoader, ShardedLoader, TrainingData
    from mst_ds.engine import Run
    from mst_ds.metrics import MetricsWriter, Sink
    from mst_ds.resilience.interruption import Interruption
    from mst_ds.training.saver import Saver

# What libraries say to each other of names that will change: every rank would say it, at each of its calls.
_OF_LIBRARIES = (
    r"`torch\.distributed\.\w+` is deprecated",
    "`is_gradient_checkpointing` is deprecated",
)
_SECONDS_FOR_THE_FIRST_RANK = 10.0


@dataclass(frozen=True)
class _Job:
    """All that a run is, before the processes meet.

    repository: of the Hugging Face hub, which this rank uploads the model to.
    """

    run: Run
    data: TrainingData
    batches: ShardedLoader
    held_out: EvalLoader | None
    folder: Path
    repository: str | None


def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 2, and one line on stderr, for a request that cannot run."""
    # Weights may take longer to load than the warning is early.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    with ExitStack() as held:
        try:
            job = _checked(argv, held)
        except REQUEST_ERRORS as error:
            _say_once(error)
            return EXIT_REFUSED
        return _train_or_end(job, held)


def _checked(argv: Sequence[str], held: ExitStack) -> _Job:
    """All that can refuse a run before the processes meet, from cheap to dear.

    Args:
        held: gets what lasts as long as the run.

    Raises:
        ValueError: anything in the request that cannot run, in one line.
    """
    config = parse_train_config(argv)
    look_at_datasets(config)
    # From here on imports take seconds; a mistyped flag or file has been answered already.
    _quiet_libraries()
    settle_environment(os.environ)
    from mst_ds.data import load_training_data
    from mst_ds.engine import (
        Launch,
        claimed,
        evaluation_batches,
        output_folder,
        prepare,
        require_same_checkpoint,
        training_batches,
        with_steps_of_epochs,
    )

    run = prepare(config, Launch.from_environment())
    folder = output_folder(config)
    repository = None
    if run.launch.rank == 0:
        held.enter_context(claimed(folder))
        require_same_checkpoint(config, run.checkpoint)
        if config.push_to_hub:
            from mst_ds.model_folder.hub import make_repository

            repository = make_repository(config.hub_model_id or folder.absolute().name, private=config.hub_private_repo)
    # Tokenising may take an hour: what can be refused without it has been.
    data = load_training_data(config, run.tokenizer)
    batches = training_batches(run, data)
    return _Job(with_steps_of_epochs(run, data), data, batches, evaluation_batches(run, data), folder, repository)


def _quiet_libraries() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    for message in _OF_LIBRARIES:
        warnings.filterwarnings("ignore", message, FutureWarning)


def settle_environment(environment: MutableMapping[str, str]) -> None:
    """What torch and NCCL read when they are imported; what the user has set stays."""
    # Chunks of many sizes come and go: fixed segments would lose memory between blocks. torch 2.9 has both names.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # ZeRO's gathers and attention's all-to-alls are of two communicators, whose kernels must not wait for each other.
    environment.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")


def _train_or_end(job: _Job, held: ExitStack) -> int:
    """Returns the exit code; an error ends the process at once, without what is held."""
    from mst_ds.resilience.failure import explain

    run = job.run
    try:
        return _train(job)
    except Exception as error:
        if isinstance(error, (FloatingPointError, RequestError)):
            _say_once(error)
        else:
            if not isinstance(error, (OSError, MemoryError)):
                traceback.print_exc()
            message = explain(error, run.plan, run.config.hang_timeout)
            say(error_line(TRAIN_COMMAND, message, rank=run.launch.rank))
        held.close()
        # Not after another collective: the others wait in theirs until the launcher ends them, because this rank ended.
        os._exit(EXIT_FAILED)


def _say_once(error: Exception) -> None:
    """One line a node, of an error that every rank has."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        # The launcher ends this process when the first rank has spoken. Ending sooner would have the first rank killed
        # before it could; still here, the error is this rank's alone.
        time.sleep(_SECONDS_FOR_THE_FIRST_RANK)
    say(error_line(TRAIN_COMMAND, one_line(error)))


def _train(job: _Job) -> int:
    """Returns the exit code."""
    import deepspeed
    import torch.distributed as dist

    from mst_ds.engine import meet
    from mst_ds.resilience.interruption import Interruption
    from mst_ds.resilience.watchdog import Watchdog

    run_on_without_output()
    run = meet(job.run)
    # A name made of the time may be another on each rank.
    folders = [job.folder]
    dist.broadcast_object_list(folders)
    with Watchdog(), Interruption() as interruption:
        is_done = _take_steps(replace(job, run=run, folder=folders[0]), interruption)
    deepspeed.comm.destroy_process_group()
    if is_done and job.repository is not None:
        # The other ranks are done: they need not wait for it.
        from mst_ds.model_folder.hub import upload_model

        print(f"uploaded: {upload_model(folders[0] / 'model', job.repository)}")
    return 0 if is_done else EXIT_STOPPED


def _take_steps(job: _Job, interruption: Interruption) -> bool:
    """Returns whether the last step was reached; then the model is written, too."""
    from mst_ds.checkpoint import load_checkpoint
    from mst_ds.checkpoint.export import export_run
    from mst_ds.engine import build_engine
    from mst_ds.metrics import device_name, reserved_bytes, resident_bytes
    from mst_ds.planner.calibration import calibration_record
    from mst_ds.sequence_parallel import new_sequence_group
    from mst_ds.training.loop import train
    from mst_ds.training.objective import objective_of
    from mst_ds.training.step_profile import StepProfile, step_to_profile

    run, folder = job.run, job.folder
    config, plan = run.config, run.plan
    is_first = run.launch.rank == 0
    amounts = job.data.amounts(config.max_steps, plan.samples_per_step)
    if is_first:
        _announce(job, amounts)
    # Each step writes to an optimizer's states on the host: workers that were forked beside them would keep old ones.
    for loader in (job.batches, job.held_out):
        if loader is not None:
            loader.start_workers()
    trackers = _trackers(run, folder)
    before = resident_bytes()
    group = new_sequence_group(plan.sp_size)
    engine = build_engine(run, group)
    objective = objective_of(engine, run, job.data, group, folder)
    if run.checkpoint is not None:
        load_checkpoint(engine, run.checkpoint, seed=config.seed)
    saver = _saver(job, engine, interruption)
    profile = None
    if config.profile and is_first:
        step = step_to_profile(steps_done=run.steps_done, max_steps=config.max_steps)
        profile = StepProfile(engine.device, folder / "profile", step=step)
    with _metrics(run, folder, engine.device, trackers) as metrics:
        is_done = train(
            engine,
            plan,
            job.batches,
            metrics,
            max_steps=config.max_steps,
            steps_done=run.steps_done,
            eval_steps=config.eval_steps,
            held_out=job.held_out,
            objective=objective,
            non_finite=config.non_finite,
            after_step=saver.after_step,
            profile=profile,
        )
        if is_done:
            best = _load_best(job, engine)
            export_run(
                engine,
                run.tokenizer,
                folder,
                source=config.model,
                merge_adapter=config.merge_adapter,
                whole=run.whole,
            )
            of_run = {
                "device": device_name(engine.device),
                "data": amounts,
                "plan": plan.as_dict(),
                "ds_config": run.ds_config,
                "calibration": calibration_record(
                    run.request,
                    plan,
                    steps_done=run.steps_done,
                    profiled_step=None if profile is None else profile.step,
                    profile=None if profile is None else profile.seconds,
                    reserve=reserved_bytes(engine.device),
                    process_bytes=before,
                ),
                **best,
            }
            metrics.write_summary(of_run)
    if is_first and is_done:
        left = "the model"
        if config.adapters is not None:
            left = "the model with its adapters merged" if config.merge_adapter else "the adapters"
        print(f"Done: {folder / 'metrics.jsonl'}, {folder / 'summary.json'} and {left} in {folder / 'model'}")
    engine.destroy()
    return is_done


def _announce(job: _Job, amounts: Mapping[str, int | float]) -> None:
    """What a user should know before the first step."""
    from mst_ds.answers import plan_table
    from mst_ds.data import describe, shown_samples

    run = job.run
    print(describe(amounts, run.config.max_steps))
    console().print(plan_table(run.plan))
    for note in run.notes:
        print(note)
    for line in (job.data.mixture, job.data.template, job.data.note, job.data.warning):
        if line is not None:
            print(line)
    samples = shown_samples(job.data.train, run.tokenizer, number=run.config.show_samples, seed=run.config.seed)
    for sample in samples:
        console().print(sample, soft_wrap=True)
    if run.checkpoint is not None:
        print(f"goes on after step {run.steps_done}, from {run.checkpoint.folder}")


def _saver(job: _Job, engine: DeepSpeedEngine, interruption: Interruption) -> Saver:
    from mst_ds.checkpoint import CheckpointWriter, checkpoints_folder
    from mst_ds.training.saver import Saver

    run, config = job.run, job.run.config
    writer = CheckpointWriter(
        folder=checkpoints_folder(job.folder),
        keep=config.save_total_limit,
        identity=run.identity,
        tokenizer=run.tokenizer,
        source=config.model,
        whole=run.whole,
        keeps_best=config.load_best_model_at_end,
    )
    return Saver(
        engine,
        job.batches,
        writer,
        interruption,
        max_steps=config.max_steps,
        save_steps=config.save_steps,
        save_minutes=config.save_minutes,
    )


def _trackers(run: Run, folder: Path) -> Sequence[Sink]:
    """Before weights load: an account may be missing."""
    from mst_ds.metrics import start_trackers

    return start_trackers(
        run.config.reports,
        folder,
        rank=run.launch.rank,
        flags=asdict(run.config),
        goes_on=run.checkpoint is not None,
    )


def _load_best(job: _Job, engine: DeepSpeedEngine) -> dict[str, int | float]:
    """Has the engine be that of the best step, where that is asked for; which it is, for the summary."""
    from mst_ds.checkpoint import checkpoints_folder, load_best

    run, config = job.run, job.run.config
    if not config.load_best_model_at_end:
        return {}
    best = load_best(engine, checkpoints_folder(job.folder), step=config.max_steps, seed=config.seed)
    if best is None or best.eval_loss is None:
        note, values = "no evaluation has a finite loss: the model is that of the last step", {}
    else:
        note = f"the model is that of step {best.step}, whose evaluation loss {best.eval_loss:.4f} is the lowest"
        values = {"best_step": best.step, "best_eval_loss": best.eval_loss}
    if run.launch.rank == 0:
        print(note)
    return values


def _metrics(run: Run, folder: Path, device: torch.device, trackers: Sequence[Sink]) -> MetricsWriter:
    from mst_ds.metrics import MetricsWriter, peak_flops
    from mst_ds.model_shape import ModelShape, flops_per_token

    flops = peak_flops(device, run.dtype)
    return MetricsWriter(
        folder,
        max_steps=run.config.max_steps,
        steps_done=run.steps_done,
        rank=run.launch.rank,
        flops_per_token=flops_per_token(ModelShape.from_config(run.model_config), run.config.seq_len),
        peak_flops=None if flops is None else flops * run.launch.world_size,
        tensorboard=TENSORBOARD in run.config.reports,
        trackers=trackers,
    )


def cli() -> int:
    """The command of a process; returns its exit code."""
    return run_command(TRAIN_COMMAND, main)


if __name__ == "__main__":
    sys.exit(cli())

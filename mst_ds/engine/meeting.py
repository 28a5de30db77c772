"""The processes of a run meet, and agree on what they do."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from datetime import timedelta

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch.distributed import HashStore  # type: ignore[attr-defined]

from mst_ds.command_line.entry_point import RequestError
from mst_ds.engine.agreement import request_of_all
from mst_ds.engine.jit_build import build_shared_memory_collective, unlink_shared_memory
from mst_ds.engine.launch import stand_alone, stay_on_node
from mst_ds.engine.run import Run
from mst_ds.planner import plan_of_request


class RanksDisagreeError(RequestError):
    """The ranks were given, or see, what does not go together. Every rank raises it."""


def meet(run: Run) -> Run:
    """Let the processes meet, and plan again where their devices or their hosts differ. A collective call.

    Raises:
        RanksDisagreeError: they would go on from different checkpoints, or their devices have each choose another
            `sp_size`.
        RequestError: the place where they should meet is in use or not reached, or not all come there.
    """
    timeout = timedelta(seconds=run.config.hang_timeout)
    get_accelerator().set_device(run.launch.local_rank)
    is_alone = "MASTER_ADDR" not in os.environ
    if is_alone:
        stand_alone()
    else:
        _require_free_port(run.launch.rank)
    stay_on_node()
    build_shared_memory_collective()
    if is_alone:
        # It meets nobody, so that no store need listen for others.
        backend = get_accelerator().communication_backend_name()
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        deepspeed.init_distributed(timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise RequestError(_why_no_meeting(error)) from None
    # When all ranks have opened each other's.
    dist.barrier()
    unlink_shared_memory(run.launch.rank)
    _require_same_checkpoint(run)
    _require_same_sp_size(run)
    request = request_of_all(run.request)
    return run if request == run.request else replace(run, request=request, plan=plan_of_request(request))


def _require_free_port(rank: int) -> None:
    """Rank 0 looks before torch does, which writes lines of its own. An agent of torchrun holds the port itself."""
    if rank != 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    port = os.environ["MASTER_PORT"]
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise RequestError(
            f"MASTER_PORT is {port}, where rank 0 cannot listen ({reason}); allowed: a free port (deepspeed "
            "--master_port 29501)"
        ) from None


def _why_no_meeting(error: dist.DistNetworkError | dist.DistStoreError) -> str:
    if isinstance(error, dist.DistStoreError):
        return (
            f"not all ranks came to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where rank 0 waited for "
            f"them: {error}; allowed: WORLD_SIZE ranks, all with this address; --hang_timeout says how long rank 0 "
            "waits"
        )
    return (
        f"rank {os.environ['RANK']} does not reach {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, where the "
        f"ranks should meet: {error}; allowed: the address of rank 0's node and a free port of it, for all ranks"
    )


def _require_same_checkpoint(run: Run) -> None:
    found = [None if run.checkpoint is None else (run.checkpoint.step, str(run.checkpoint.folder))]
    steps = found * run.launch.world_size
    dist.all_gather_object(steps, found[0])
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise RanksDisagreeError(
                f"rank 0 goes on from {steps[0]}, but rank {rank} from {step}; allowed: a folder that all ranks see"
            )


def _require_same_sp_size(run: Run) -> None:
    sizes = [run.plan.sp_size] * run.launch.world_size
    dist.all_gather_object(sizes, run.plan.sp_size)
    for rank, size in enumerate(sizes):
        if size != sizes[0]:
            raise RanksDisagreeError(
                f"rank 0 chooses sp_size {sizes[0]} for its device, but rank {rank} {size}; allowed: one of them in "
                "the 'mst' block"
            )

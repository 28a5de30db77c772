"""From what the user wrote to the plan of one rank, and to the longest sequence that fits."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mst_ds.config import GIB
from mst_ds.geometry import shard_length
from mst_ds.gpus import Gpu
from mst_ds.model_shape import require_positions
from mst_ds.planner.choices import describe_choices
from mst_ds.planner.cost import model_flops_utilisation, step_seconds
from mst_ds.planner.flops import micro_batch_flops
from mst_ds.planner.phases import step_phases
from mst_ds.planner.request import Request, read_request
from mst_ds.planner.sequence_ranks import chosen_work, settle_sp_size
from mst_ds.planner.types import Plan
from mst_ds.planner.workload import remembered

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from mst_ds.model_shape import ModelShape

# Bytes for CUDA's context, NCCL's buffers and the allocator's losses: an allowance that is stated, not measured.
DEFAULT_RESERVE = 2 * GIB
# Tokens: finer than this a longest length means nothing.
LENGTH_STEP = 1024


def make_plan(
    model_config: PreTrainedConfig | ModelShape | str,
    ds_config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    world_size: int,
    seq_len: int,
    device_memory: int | Sequence[int] | None = None,
    reserve: int = 0,
    host_memory: int | None = None,
    sp_size: int | None = None,
    rank: int = 0,
    ranks_per_node: int | None = None,
    gpu: Gpu | None = None,
) -> Plan:
    """Plans one rank. A plan that does not fit is a plan too, with `fits` False.

    Where the JSON leaves bf16 to "auto", the plan is for an accelerator; a resolved config gives the plan for
    the machine it was resolved on. `choose_settings` chooses what is predicted fastest of what fits.

    Args:
        model_config: a Hugging Face config, or a name or folder as `load_model_shape` takes it; or a shape, such as
            `mst_ds.structure.trained.trained_shape` gives for a model with adapters.
        ds_config: a DeepSpeed JSON, or a mapping of the same content, with or without its "mst" block.
        world_size: ranks of the run.
        seq_len: S, tokens of a whole sequence.
        device_memory: bytes that a rank may use; a sequence of one number for each rank where they differ. Then chunk
            counts follow from the rank's own memory, what all ranks must do alike from the least. None: what
            `device_memory_gib` of the "mst" block says.
        reserve: bytes of `device_memory` that tensors cannot have, such as `DEFAULT_RESERVE`. The number in the
            "mst" block's `reserve_gib`, where there is one, takes its place.
        host_memory: bytes of the host that a rank may use. None: not known; then activations go there only if the "mst"
            block says so.
        sp_size: ranks that share a sequence. None: what the "mst" block says.
        rank: the rank to plan for.
        ranks_per_node: keeps an automatic `sp_size` within a node. None: all ranks are on one.
        gpu: whose rates predict the time of a step. None: not known, nothing is predicted, and an H100's rank choices.

    Raises:
        ValueError: a setting that cannot be planned, in one line with what is allowed.
    """
    request = read_request(
        model_config,
        ds_config,
        world_size=world_size,
        seq_len=seq_len,
        device_memory=device_memory,
        reserve=reserve,
        host_memory=host_memory,
        sp_size=sp_size,
        rank=rank,
        ranks_per_node=ranks_per_node,
        gpu=gpu,
    )
    return plan_of_request(request)


def plan_of_request(request: Request, *, has_choices: bool = True) -> Plan:
    """The plan of the request's rank, with the `sp_size` that `settle_sp_size` chooses.

    Args:
        has_choices: whether it says what each setting costs and saves, of which some plans are made without.

    Raises:
        ValueError: the model has fewer positions.
    """
    request = settle_sp_size(request)
    require_positions(request.work.shape.fixed_positions, request.work.seq_len // request.sequences_per_sample)
    zero, device_memory = request.work.zero, request.device_memory[request.topology.rank]
    work = chosen_work(request)
    gpu = request.rates if request.times_are_known else None
    seconds = None if gpu is None else step_seconds(work, gpu)
    return Plan(
        settings=work.settings,
        topology=request.topology,
        seq_len=work.seq_len,
        shard_length=shard_length(work.seq_len, work.sp_size),
        micro_batch_size=zero.micro_batch_size,
        gradient_accumulation_steps=zero.gradient_accumulation_steps,
        zero_stage=zero.stage,
        dtype=zero.dtype,
        device_memory=device_memory,
        host_memory=request.host_memory,
        phases=step_phases(work),
        counts_are_exact=work.shape.counts_are_exact,
        layers_as_attention=work.shape.layers_as_attention,
        choices=describe_choices(work, gpu=gpu) if has_choices else (),
        flops=micro_batch_flops(work),
        predicted_step_seconds=seconds,
        predicted_mfu=None if seconds is None else model_flops_utilisation(work, request.rates, seconds),
    )


def longest_seq_len(
    model_config: PreTrainedConfig | ModelShape | str,
    ds_config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    world_size: int,
    device_memory: int | Sequence[int] | None = None,
    reserve: int = 0,
    host_memory: int | None = None,
    sp_size: int | None = None,
    ranks_per_node: int | None = None,
) -> int:
    """The longest `seq_len` whose plan fits, a multiple of 1024 tokens or all the positions that the model has; 0 where
    1024 tokens do not fit.

    The arguments are those of `make_plan`.

    Raises:
        ValueError: a setting that cannot be planned, in one line with what is allowed.
    """
    request = read_request(
        model_config,
        ds_config,
        world_size=world_size,
        seq_len=LENGTH_STEP,
        device_memory=device_memory,
        reserve=reserve,
        host_memory=host_memory,
        sp_size=sp_size,
        ranks_per_node=ranks_per_node,
    )
    return longest_of_request(request)


@remembered
def longest_of_request(request: Request) -> int:
    """See `longest_seq_len`; the request's own length is not read. Where `sp_size` is "auto", the longest with any."""
    longest = 0
    for option in reversed(request.options()):
        # More ranks to a sequence come first: what is shorter with fewer is found by one look.
        if longest == 0 or option.fits(seq_len=longest + LENGTH_STEP):
            longest = max(longest, _longest_of_option(option))
    return min(longest, request.most_tokens or longest)


def _longest_of_option(request: Request) -> int:
    def is_too_long(steps: int) -> bool:
        return not request.fits(seq_len=steps * LENGTH_STEP)

    above = 1
    while not is_too_long(above):
        above *= 2
    # The first that is too long; all that are shorter fit.
    return LENGTH_STEP * (bisect_left(range(above), True, lo=above // 2, key=is_too_long) - 1) if above > 1 else 0

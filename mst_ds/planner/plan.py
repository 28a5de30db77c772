"""From what the user wrote to the plan of one rank."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mst_ds.config import AUTO, GIB, MstConfig, TrainConfig
from mst_ds.model_shape import ModelShape, load_model_shape
from mst_ds.planner.choices import describe_choices
from mst_ds.planner.flops import micro_batch_flops
from mst_ds.planner.phases import step_phases
from mst_ds.planner.search import can_fit, choose_settings
from mst_ds.planner.types import Plan
from mst_ds.planner.workload import Workload
from mst_ds.topology import Topology, choose_sp_size, shard_length
from mst_ds.zero import load_ds_config, read_zero, resolve, split_mst

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Bytes for CUDA's context, NCCL's buffers and the allocator's losses: an allowance that is stated, not measured.
DEFAULT_RESERVE = 2 * GIB
# Tokens: finer than this a longest length means nothing.
LENGTH_STEP = 1024


def make_plan(
    model_config: PreTrainedConfig | str,
    ds_config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    world_size: int,
    seq_len: int,
    device_memory: int | None = None,
    reserve: int = 0,
    host_memory: int | None = None,
    sp_size: int | None = None,
    rank: int = 0,
    ranks_per_node: int | None = None,
) -> Plan:
    """Plans one rank. A plan that does not fit is a plan too, with `fits` False.

    Where the JSON leaves bf16 to "auto", the plan is for an accelerator; a resolved config gives the plan for
    the machine it was resolved on. `choose_settings` chooses the fastest that fits: no recompute; else recompute that
    keeps the attention's output too, on the device or else on the host, before attention is computed a second time.

    Args:
        model_config: a Hugging Face config, or a name or folder as `load_model_shape` takes it.
        ds_config: a DeepSpeed JSON, or a mapping of the same content, with or without its "mst" block.
        world_size: ranks of the run.
        seq_len: S, tokens of a whole sequence.
        device_memory: bytes that a rank may use. None: what `device_memory_gib` of the "mst" block says.
        reserve: bytes of `device_memory` that tensors cannot have, such as `DEFAULT_RESERVE`. The number in the
            "mst" block's `reserve_gib`, where there is one, takes its place.
        host_memory: bytes of the host that a rank may use. None: not known; then activations go there only if the "mst"
            block says so.
        sp_size: ranks that share a sequence. None: what the "mst" block says.
        rank: the rank to plan for.
        ranks_per_node: keeps an automatic `sp_size` within a node. None: all ranks are on one.

    Raises:
        ValueError: a setting that cannot be planned, in one line with what is allowed.
    """
    asked = _read(
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
    )
    zero = asked.work.zero
    settings = choose_settings(asked.work, asked.mst, device_memory=asked.device_memory, host_memory=asked.host_memory)
    work, chunks = settings.work, {"mlp_chunks": settings.mlp_chunks, "loss_chunks": settings.loss_chunks}
    return Plan(
        topology=asked.topology,
        seq_len=seq_len,
        shard_length=shard_length(seq_len, work.sp_size),
        micro_batch_size=zero.micro_batch_size,
        gradient_accumulation_steps=zero.gradient_accumulation_steps,
        zero_stage=zero.stage,
        dtype=zero.dtype,
        **chunks,
        recompute=work.recompute,
        keep_attention=work.keep_attention,
        offload_activations=work.offload_activations,
        head_groups=work.head_groups,
        attention=work.attention,
        device_memory=asked.device_memory,
        phases=step_phases(work, **chunks),
        counts_are_exact=work.shape.counts_are_exact,
        choices=describe_choices(work, **chunks),
        flops=micro_batch_flops(work),
    )


def longest_seq_len(
    model_config: PreTrainedConfig | str,
    ds_config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    world_size: int,
    device_memory: int | None = None,
    reserve: int = 0,
    host_memory: int | None = None,
    sp_size: int | None = None,
    ranks_per_node: int | None = None,
) -> int:
    """The longest `seq_len`, a multiple of 1024 tokens, whose plan fits; 0 where not even the first does.

    The arguments are those of `make_plan`.

    Raises:
        ValueError: a setting that cannot be planned, in one line with what is allowed.
    """
    asked = _read(
        model_config,
        ds_config,
        world_size=world_size,
        seq_len=LENGTH_STEP,
        device_memory=device_memory,
        reserve=reserve,
        host_memory=host_memory,
        sp_size=sp_size,
        rank=0,
        ranks_per_node=ranks_per_node,
    )

    def is_too_long(steps: int) -> bool:
        work = replace(asked.work, seq_len=steps * LENGTH_STEP)
        return not can_fit(work, asked.mst, device_memory=asked.device_memory, host_memory=asked.host_memory)

    above = 1
    while not is_too_long(above):
        above *= 2
    # The first that is too long; all that are shorter fit.
    return LENGTH_STEP * (bisect_left(range(above), True, lo=above // 2, key=is_too_long) - 1) if above > 1 else 0


@dataclass(frozen=True)
class _Asked:
    """A request as it was understood; what `work` keeps and its groups of heads are still to be chosen."""

    topology: Topology
    work: Workload
    mst: MstConfig
    device_memory: int
    host_memory: int | None


def _read(
    model_config: PreTrainedConfig | str,
    ds_config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    world_size: int,
    seq_len: int,
    device_memory: int | None,
    reserve: int,
    host_memory: int | None,
    sp_size: int | None,
    rank: int,
    ranks_per_node: int | None,
) -> _Asked:
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; allowed: a whole number >= 1")
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; allowed: a whole number >= 1")
    if host_memory is not None and host_memory < 0:
        raise ValueError(f"host_memory is {host_memory}; allowed: a whole number of bytes >= 0")
    shape = load_model_shape(model_config) if isinstance(model_config, str) else ModelShape.from_config(model_config)
    raw = load_ds_config(ds_config)
    mst = split_mst(raw)[1]
    sp_size = choose_sp_size(
        mst.sp_size if sp_size is None else sp_size,
        world_size=world_size,
        num_attention_heads=shape.num_attention_heads,
        ranks_per_node=ranks_per_node,
    )
    topology = Topology(rank, world_size, sp_size)
    resolved = resolve(
        raw,
        train=TrainConfig(),  # fills rates only, which take no memory
        hidden_size=shape.hidden_size,
        has_accelerator=True,
        dp_size=topology.dp_size,
    )
    zero = read_zero(resolved, dp_world_size=world_size)
    attention = _attention(mst, zero.dtype)
    work = Workload(
        shape=shape,
        zero=zero,
        sp_size=sp_size,
        seq_len=seq_len,
        attention=attention,
        reserve=_reserve(reserve, mst),
    )
    return _Asked(topology, work, mst, _device_memory(device_memory, mst), host_memory)


def _attention(mst: MstConfig, dtype: str) -> str:
    if mst.attention == "flash_attention_2" and dtype == "fp32":
        raise ValueError(
            "attention in 'mst' is 'flash_attention_2', which has no fp32; allowed: 'sdpa', or enable bf16"
        )
    if mst.attention != AUTO:
        return mst.attention
    # Where the package is missing, as on most machines that only plan, transformers' seconds are saved.
    if dtype == "fp32" or find_spec("flash_attn") is None:
        return "sdpa"
    from transformers.utils.import_utils import is_flash_attn_2_available

    return "flash_attention_2" if is_flash_attn_2_available() else "sdpa"


def _device_memory(device_memory: int | None, mst: MstConfig) -> int:
    if device_memory is None:
        if mst.device_memory_gib == AUTO:
            raise ValueError("device_memory is not known; allowed: bytes, or a number in 'mst' for device_memory_gib")
        return int(mst.device_memory_gib * GIB)
    if device_memory < 1:
        raise ValueError(f"device_memory is {device_memory}; allowed: a whole number of bytes >= 1")
    return device_memory


def _reserve(reserve: int, mst: MstConfig) -> int:
    if mst.reserve_gib != AUTO:
        return int(mst.reserve_gib * GIB)
    if reserve < 0:
        raise ValueError(f"reserve is {reserve}; allowed: a whole number of bytes >= 0")
    return reserve

"""From what the user wrote to the plan of one rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mst_ds.config import AUTO, GIB, MstConfig, TrainConfig
from mst_ds.model_shape import ModelShape, load_model_config
from mst_ds.planner.choices import describe_choices
from mst_ds.planner.flops import micro_batch_flops
from mst_ds.planner.phases import step_phases
from mst_ds.planner.search import choose_settings
from mst_ds.planner.types import Plan
from mst_ds.planner.workload import Workload
from mst_ds.topology import Topology, choose_sp_size, shard_length
from mst_ds.zero import load_ds_config, read_zero, resolve, split_mst

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def make_plan(
    model_config: PreTrainedConfig | str,
    ds_config: str | os.PathLike[str] | Mapping[str, Any],
    *,
    world_size: int,
    seq_len: int,
    device_memory: int | None = None,
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
        model_config: a Hugging Face config, or a name or folder as `load_model_config` takes it.
        ds_config: a DeepSpeed JSON, or a mapping of the same content, with or without its "mst" block.
        world_size: ranks of the run.
        seq_len: S, tokens of a whole sequence.
        device_memory: bytes that a rank may use. None: what `device_memory_gib` of the "mst" block says.
        host_memory: bytes of the host that a rank may use. None: not known; then activations go there only if the "mst"
            block says so.
        sp_size: ranks that share a sequence. None: what the "mst" block says.
        rank: the rank to plan for.
        ranks_per_node: keeps an automatic `sp_size` within a node. None: all ranks are on one.

    Raises:
        ValueError: a setting that cannot be planned, in one line with what is allowed.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; allowed: a whole number >= 1")
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; allowed: a whole number >= 1")
    if host_memory is not None and host_memory < 0:
        raise ValueError(f"host_memory is {host_memory}; allowed: a whole number of bytes >= 0")
    config = load_model_config(model_config) if isinstance(model_config, str) else model_config
    shape = ModelShape.from_config(config)
    raw = load_ds_config(ds_config)
    mst = split_mst(raw)[1]
    topology = Topology(
        rank,
        world_size,
        choose_sp_size(
            mst.sp_size if sp_size is None else sp_size,
            world_size=world_size,
            num_attention_heads=shape.num_attention_heads,
            ranks_per_node=ranks_per_node,
        ),
    )
    resolved = resolve(
        raw,
        train=TrainConfig(),  # fills rates only, which take no memory
        hidden_size=shape.hidden_size,
        has_accelerator=True,
        dp_size=topology.dp_size,
    )
    zero = read_zero(resolved, dp_world_size=world_size)
    memory = _device_memory(device_memory, mst)
    settings = choose_settings(
        Workload(
            shape=shape,
            zero=zero,
            sp_size=topology.sp_size,
            seq_len=seq_len,
            attention=_attention(mst, zero.dtype),
        ),
        mst,
        device_memory=memory,
        host_memory=host_memory,
    )
    work, chunks = settings.work, {"mlp_chunks": settings.mlp_chunks, "loss_chunks": settings.loss_chunks}
    return Plan(
        topology=topology,
        seq_len=seq_len,
        shard_length=shard_length(seq_len, topology.sp_size),
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
        device_memory=memory,
        phases=step_phases(work, **chunks),
        counts_are_exact=shape.counts_are_exact,
        choices=describe_choices(work, **chunks),
        flops=micro_batch_flops(work),
    )


def _attention(mst: MstConfig, dtype: str) -> str:
    if mst.attention == "flash_attention_2" and dtype == "fp32":
        raise ValueError(
            "attention in 'mst' is 'flash_attention_2', which has no fp32; allowed: 'sdpa', or enable bf16"
        )
    if mst.attention != AUTO:
        return mst.attention
    from transformers.utils.import_utils import is_flash_attn_2_available

    return "flash_attention_2" if dtype != "fp32" and is_flash_attn_2_available() else "sdpa"


def _device_memory(device_memory: int | None, mst: MstConfig) -> int:
    if device_memory is None:
        if mst.device_memory_gib == AUTO:
            raise ValueError("device_memory is not known; allowed: bytes, or a number in 'mst' for device_memory_gib")
        return int(mst.device_memory_gib * GIB)
    if device_memory < 1:
        raise ValueError(f"device_memory is {device_memory}; allowed: a whole number of bytes >= 1")
    return device_memory

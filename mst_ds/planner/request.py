"""What a user asks a plan for, understood: the model's shape, the ZeRO settings, the topology, each rank's memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mst_ds.config import AUTO, GIB, TrainConfig
from mst_ds.flash_attn_package import flash_attn_2_version
from mst_ds.gpus import CPU, DEFAULT_GPU, Gpu
from mst_ds.model_shape import ModelShape, load_model_shape
from mst_ds.planner import nvme
from mst_ds.planner.search import can_fit
from mst_ds.planner.workload import Workload
from mst_ds.settings import MstConfig, Settings
from mst_ds.topology import Topology
from mst_ds.zero import ResolvedConfig, read_resolved

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


# Of a rank; a search through more would leave the integers that ranges can have.
_MOST_TOKENS = 2**40


@dataclass(frozen=True)
class Request:
    """Of the settings of `work` chunk counts, groups of heads and what a search chooses are still to be chosen.

    Attributes:
        device_memory: bytes of each rank of the world.
        host_memory: bytes of the host for a rank, None where not known.
        rates: what a device does in a second.
        times_are_known: whether the rates are those of the devices that are planned for.
        samples_per_step: what the JSON fixes them to, None where they follow from the other settings.
        other_sp_sizes: where `sp_size` is "auto", what it may be in place of that of `work`; `settle_sp_size` chooses.
    """

    topology: Topology
    work: Workload
    mst: MstConfig
    device_memory: tuple[int, ...]
    host_memory: int | None
    rates: Gpu
    times_are_known: bool
    samples_per_step: int | None = None
    other_sp_sizes: tuple[int, ...] = ()

    @property
    def sequences_per_sample(self) -> int:
        """The sequence of `work` is so many, each with positions from 0."""
        return self.work.sequences_per_sample

    @property
    def most_tokens(self) -> int | None:
        """Tokens of a sample for which the model has positions; None where any number will do."""
        positions = self.work.shape.fixed_positions
        return None if positions is None else positions * self.sequences_per_sample

    @property
    def least_device_memory(self) -> int:
        """What all that the ranks do alike must fit into."""
        return min(self.device_memory)

    def with_length(self, seq_len: int) -> Request:
        return replace(self, work=replace(self.work, seq_len=seq_len))

    def options(self) -> tuple[Request, ...]:
        """This with each `sp_size` that may be chosen, and no other to choose, from the smallest on."""
        return tuple(self.with_sp_size(size) for size in sorted((self.work.sp_size, *self.other_sp_sizes)))

    def with_sp_size(self, sp_size: int) -> Request:
        """This with so many ranks to a sequence, and no other number to choose."""
        topology, work = replace(self.topology, sp_size=sp_size), self.work.with_settings(sp_size=sp_size)
        return replace(self, topology=topology, work=work, other_sp_sizes=())

    def fits(self, *, seq_len: int | None = None) -> bool:
        """Whether there are settings that fit, with this length in place of that of `work`."""
        work = self.work if seq_len is None else replace(self.work, seq_len=seq_len)
        return can_fit(work, self.mst, device_memory=self.least_device_memory, host_memory=self.host_memory)


def read_request(
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
    train: TrainConfig | None = None,
) -> Request:
    """Understands the arguments of `make_plan`.

    Raises:
        ValueError: a setting that cannot be planned, in one line with what is allowed.
    """
    if seq_len < 1:
        raise ValueError(f"seq_len is {seq_len}; allowed: a whole number >= 1")
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}; allowed: a whole number >= 1")
    if host_memory is not None and host_memory < 0:
        raise ValueError(f"host_memory is {host_memory}; allowed: a whole number of bytes >= 0")
    shape, train = _shape(model_config), train or TrainConfig()
    config = read_resolved(
        ds_config,
        train=train,
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_attention_heads,
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        # A run on a CPU, which calibrates, is no reason to plan for an accelerator.
        has_accelerator=gpu is None or gpu.name != CPU.name,
        sp_size=sp_size,
    )
    return make_request(
        shape,
        config,
        seq_len=seq_len,
        device_memory=device_memory,
        reserve=reserve,
        host_memory=host_memory,
        rank=rank,
        ranks_per_node=ranks_per_node,
        gpu=gpu,
        capability=None if gpu is None else gpu.capability,
        sequences_per_sample=train.sequences_per_sample,
    )


def make_request(
    shape: ModelShape,
    config: ResolvedConfig,
    *,
    seq_len: int,
    device_memory: int | Sequence[int] | None,
    reserve: int,
    host_memory: int | None,
    rank: int,
    ranks_per_node: int | None,
    gpu: Gpu | None,
    capability: tuple[int, int] | None,
    sequences_per_sample: int,
) -> Request:
    """`read_request` for a JSON that has been read.

    Args:
        seq_len: tokens of a sample.
        capability: of CUDA, of a device that need not be a known GPU; None: none, or not known.
        sequences_per_sample: see `Request`.

    Raises:
        ValueError: a setting that cannot be planned, in one line with what is allowed.
    """
    zero, mst, sp_size, world_size = config.zero, config.mst, config.sp_size, config.zero.dp_world_size
    if shape.other_layers and sp_size > shape.max_sp_size:
        others = f"the model has layers of type {', '.join(shape.other_layers)}"
        if not shape.mixer_heads:
            raise ValueError(f"{others}, which sequence parallelism does not support: use sp_size 1 for this model")
        raise ValueError(
            f"sp_size is {sp_size}, but {others} with {shape.mixer_heads} heads to divide; allowed: at most "
            f"{shape.max_sp_size}"
        )
    # What no search chooses is as the user settled it, or the default.
    settled = {**mst.given, "sp_size": sp_size, "attention": _attention(mst.get("attention"), zero.dtype)}
    work = Workload(
        shape=shape,
        zero=zero,
        seq_len=seq_len,
        settings=Settings(**settled),
        reserve=_reserve(reserve, mst),
        ranks_per_node=ranks_per_node or world_size,
        capability=capability,
        sequences_per_sample=sequences_per_sample,
    )
    nvme.require_buffers(work)
    if mst.get("attention") == AUTO and _needs_flash_package(work):
        work = work.with_settings(attention="flash_attention_2")
    if work.tokens > _MOST_TOKENS:
        raise ValueError(
            f"seq_len {seq_len} with micro batch {zero.micro_batch_size} and sp_size {sp_size} is {work.tokens} tokens "
            f"of a rank; allowed: at most {_MOST_TOKENS}"
        )
    memory = _device_memory(device_memory, mst, world_size)
    topology = Topology(rank, world_size, sp_size)
    return Request(
        topology,
        work,
        mst,
        memory,
        host_memory,
        gpu or DEFAULT_GPU,
        times_are_known=gpu is not None,
        samples_per_step=config.samples_per_step,
        other_sp_sizes=tuple(size for size in config.other_sp_sizes if size <= shape.max_sp_size),
    )


def _shape(model: PreTrainedConfig | ModelShape | str) -> ModelShape:
    if isinstance(model, ModelShape):
        return model
    return load_model_shape(model) if isinstance(model, str) else ModelShape.from_config(model)


def _attention(given: str, dtype: str) -> str:
    if given not in (AUTO, "sdpa") and dtype == "fp32":
        raise ValueError(f"attention in 'mst' is {given!r}, which has no fp32; allowed: 'sdpa', or enable bf16")
    return "sdpa" if given == AUTO else given


def _needs_flash_package(work: Workload) -> bool:
    """torch has all that the package flash-attn has but a softcap."""
    return work.shape.has_attention_softcap and work.has_flash and flash_attn_2_version() is not None


def _device_memory(given: int | Sequence[int] | None, mst: MstConfig, world_size: int) -> tuple[int, ...]:
    if given is None:
        if mst.device_memory_gib == AUTO:
            raise ValueError("device_memory is not known; allowed: bytes, or a number in 'mst' for device_memory_gib")
        given = int(mst.device_memory_gib * GIB)
    of_ranks = (given,) * world_size if isinstance(given, int) else tuple(given)
    if len(of_ranks) != world_size:
        raise ValueError(f"device_memory has {len(of_ranks)} numbers for {world_size} ranks; allowed: one for each")
    if min(of_ranks) < 1:
        raise ValueError(f"device_memory is {min(of_ranks)}; allowed: a whole number of bytes >= 1")
    return of_ranks


def _reserve(reserve: int, mst: MstConfig) -> int:
    if mst.reserve_gib != AUTO:
        return int(mst.reserve_gib * GIB)
    if reserve < 0:
        raise ValueError(f"reserve is {reserve}; allowed: a whole number of bytes >= 0")
    return reserve

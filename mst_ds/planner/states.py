"""Memory terms of the model states: parameters, gradients, optimizer, and ZeRO's buffers for them."""

from __future__ import annotations

from collections.abc import Mapping

from mst_ds.planner.types import MemoryTerm, Place, product_term
from mst_ds.planner.workload import Workload
from mst_ds.zero import OffloadDevice

Terms = tuple[MemoryTerm, ...]

_OFFLOAD_PLACES: Mapping[OffloadDevice, Place] = {"none": "device", "cpu": "host", "nvme": "nvme"}
_FP32_BYTES = 4


def reserve(work: Workload) -> Terms:
    """What CUDA's context and NCCL's buffers take, and what the allocator loses between blocks."""
    return (product_term("reserve", "device", ("bytes", work.reserve)),) if work.reserve else ()


def parameters(work: Workload) -> Terms:
    """The parameters in the model's dtype: a shard at stage 3, else all of them."""
    count = work.sharded(work.shape.parameter_count, from_stage=3)
    place = _OFFLOAD_PLACES[work.zero.param_offload]
    return (product_term("parameters", place, ("parameters of this rank", count), ("bytes", work.zero.dtype_bytes)),)


def gathered_parameters(work: Workload) -> Terms:
    """Stage 3: the whole parameters that DeepSpeed may hold at once.

    It keeps what is used again soon, up to `stage3_max_live_parameters`, and always the module that runs: a
    layer with the next one's prefetch, or the head.
    """
    if work.zero.stage < 3:
        return ()
    shape, zero = work.shape, work.zero
    needed = max(shape.layer_parameter_count + zero.stage3_prefetch_bucket_size, shape.embedding_parameter_count)
    count = min(shape.parameter_count, max(needed, zero.stage3_max_live_parameters))
    return (
        product_term("gathered_parameters", "device", ("live parameters", count), ("bytes", work.zero.dtype_bytes)),
    )


def gradients(work: Workload) -> Terms:
    """The gradients kept for the step: a shard from stage 2 on, which goes where the optimizer is."""
    zero = work.zero
    count = work.sharded(work.shape.parameter_count, from_stage=2)
    is_sharded = zero.stage >= 2
    place: Place = "host" if is_sharded and zero.optimizer_offload != "none" else "device"
    size = zero.grad_accum_dtype_bytes if is_sharded else zero.dtype_bytes
    return (product_term("gradients", place, ("gradients of this rank", count), ("bytes", size)),)


def reduce_bucket(work: Workload) -> Terms:
    """The contiguous buffer that gradients are reduced from; stages 1 and 2 have two where they overlap."""
    if work.zero.stage == 0:
        return ()
    buffers = 2 if work.zero.overlap_comm and work.zero.stage < 3 else 1
    return (
        product_term(
            "reduce_bucket",
            "device",
            ("buffers", buffers),
            ("reduce_bucket_size", work.zero.reduce_bucket_size),
            ("bytes", work.zero.dtype_bytes),
        ),
    )


def optimizer_states(work: Workload) -> Terms:
    """AdamW's two moments and the fp32 master parameters, sharded from stage 1 on."""
    zero = work.zero
    count = work.sharded(work.shape.parameter_count, from_stage=1)
    place = _OFFLOAD_PLACES[zero.optimizer_offload]
    moments = product_term(
        "adam_moments", place, ("moments", 2), ("parameters of this rank", count), ("bytes", _FP32_BYTES)
    )
    # Every ZeRO stage has a master copy, of fp32 parameters too; only plain fp32 is updated in place.
    if zero.stage == 0 and zero.dtype == "fp32":
        return (moments,)
    master = product_term("master_parameters", place, ("parameters of this rank", count), ("bytes", _FP32_BYTES))
    return (master, moments)


def optimizer_step(work: Workload) -> Terms:
    """What the step itself needs: the flat fp32 gradient, and AdamW's denominator.

    At stage 3 the step walks the shard in groups of `sub_group_size` elements.
    """
    zero = work.zero
    count = work.sharded(work.shape.parameter_count, from_stage=1)
    if zero.stage == 3:
        count = min(count, zero.sub_group_size)
    # With NVMe the step runs on the host, on what was read back.
    place: Place = "device" if zero.optimizer_offload == "none" else "host"
    denominator = product_term("adam_denominator", place, ("parameters of this step", count), ("bytes", _FP32_BYTES))
    if zero.stage == 0 and zero.dtype == "fp32":
        return (denominator,)
    gradient = product_term("fp32_gradient", place, ("parameters of this step", count), ("bytes", _FP32_BYTES))
    return (gradient, denominator)

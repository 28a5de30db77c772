"""Memory terms of the model states: parameters, gradients, optimizer, and ZeRO's buffers for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from mst_ds.planner.types import MemoryTerm, Place, product_term, total_bytes
from mst_ds.planner.workload import Workload, ceil_divide
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


def gathered_parameters(work: Workload, phase: Literal["forward", "loss", "backward"]) -> Terms:
    """Stage 3: the whole parameters that are there at the last layer, in its forward or its backward, or at the loss.

    DeepSpeed frees a module's parameters after it has run, unless one of the modules that follow uses them again before
    `stage3_max_reuse_distance` elements have gone by (`PartitionedParameterCoordinator.__params_to_release`). So the
    last layers and the head may stay from the forward to the backward. Modules to come are gathered before they run, up
    to `stage3_prefetch_bucket_size` elements, where fewer than `stage3_max_live_parameters` are there.
    """
    if work.zero.stage < 3:
        return ()
    shape, zero = work.shape, work.zero
    kept = _layers_until_backward(work)
    count = max(1, kept) * shape.layer_parameter_count
    if _keeps_embedding(work, phase):
        count += shape.embedding_parameter_count
    prefetch = min(zero.stage3_prefetch_bucket_size, max(0, zero.stage3_max_live_parameters - count))
    if phase == "forward":
        # The head comes next: one weight, which is gathered whole.
        count += shape.head_weight_count if prefetch else 0
    else:
        count += prefetch if kept < shape.num_hidden_layers else 0
    if phase == "loss":
        count += shape.head_weight_count - (0 if kept else shape.layer_parameter_count)
    live = ("live parameters", min(shape.parameter_count, count))
    return (product_term("gathered_parameters", "device", live, ("bytes", zero.dtype_bytes)),)


def _layers_until_backward(work: Workload) -> int:
    """The last layers, whose parameters stay from their forward to their backward."""
    distance = work.zero.stage3_max_reuse_distance - 2 * work.shape.head_weight_count
    return max(
        0, min(work.shape.num_hidden_layers, ceil_divide(distance, _passes(work) * work.shape.layer_parameter_count))
    )


def _keeps_embedding(work: Workload, phase: str) -> bool:
    """Whether the embedding stays until it is used again: in its backward, or before that as the head's weight."""
    shape, layers = work.shape, work.shape.num_hidden_layers * work.shape.layer_parameter_count
    if shape.head_parameter_count:
        distance = _passes(work) * layers + 2 * shape.head_parameter_count
    elif phase == "loss":
        return False  # it counts as the head's weight
    else:
        distance = layers if phase == "forward" else (_passes(work) - 1) * layers
    return distance < work.zero.stage3_max_reuse_distance


def _passes(work: Workload) -> int:
    """How often a step uses a layer's parameters."""
    return 3 if work.recompute else 2


def has_gradients_from_start(work: Workload) -> bool:
    """Whether memory for all gradients is there before the backward: stage 3 allocates it at the start, and of several
    micro-batches the first leaves its own."""
    return work.zero.stage == 3 or work.zero.gradient_accumulation_steps > 1


def gradients(work: Workload, *, so_far: int | None = None) -> Terms:
    """The gradients kept for the step: a shard from stage 2 on, which goes where the optimizer is.

    Args:
        so_far: parameters whose gradients are there already. None: all.
    """
    zero = work.zero
    count = work.sharded(work.shape.parameter_count, from_stage=2)
    if so_far is not None:
        count = min(count, so_far)
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
    """The gradients, and what the step itself needs: a flat fp32 copy of them. A fused AdamW needs nothing more.

    At stage 3 the step walks the shard in groups of `sub_group_size` elements.
    """
    zero = work.zero
    if zero.stage == 0:
        return gradients(work)
    count = work.sharded(work.shape.parameter_count, from_stage=1)
    if zero.stage == 3:
        count = min(count, zero.sub_group_size)
    # With NVMe the step runs on the host, on what was read back.
    place: Place = "device" if zero.optimizer_offload == "none" else "host"
    copy = product_term("fp32_gradient", place, ("parameters of this step", count), ("bytes", _FP32_BYTES))
    if zero.stage == 1:
        # Those of the other ranks' parameters are freed before the copy is made.
        own = product_term("gradients", "device", ("gradients of this rank", count), ("bytes", zero.dtype_bytes))
        return max(gradients(work), (own, copy), key=total_bytes)
    return (*gradients(work), copy, *(reduce_bucket(work) if zero.stage == 3 else ()))

"""Memory terms of the model states: parameters, gradients, optimizer, and ZeRO's buffers for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

from mst_ds.geometry import ceil_divide, pinned_block
from mst_ds.optimizers import BLOCK_OF_8_BITS, LEAST_OF_8_BITS
from mst_ds.planner import nvme
from mst_ds.planner.persistent import persistent_counts
from mst_ds.planner.pinned import pinned, rounding_term
from mst_ds.planner.types import MemoryTerm, Place, product_term, state_term, total_bytes
from mst_ds.planner.weights import ranges, rounding_of_shards, sub_groups, weights_of_ranges, weights_one_by_one
from mst_ds.planner.workload import Workload
from mst_ds.zero import OffloadDevice

Terms = tuple[MemoryTerm, ...]

_OFFLOAD_PLACES: Mapping[OffloadDevice, Place] = {"none": "device", "cpu": "host", "nvme": "nvme"}
_FP32_BYTES = 4
# How often a step uses a layer's parameters: in its forward and in its backward, which computes it again by itself.
_PASSES = 2
# Of a buffer of `DeepSpeedEngine.buffered_allreduce_fallback`.
_ALL_REDUCE_ELEMENTS = 5 * 10**8


def reserve(work: Workload) -> Terms:
    """What CUDA's context and NCCL's buffers take, and what the allocator loses between blocks."""
    return (product_term("reserve", "device", ("bytes", work.reserve), kind="reserve"),) if work.reserve else ()


def parameters(work: Workload) -> Terms:
    """The parameters in the model's dtype: a shard at stage 3, else all of them.

    On the host what is trained is a pinned block for each group of the optimizer, and what is not, one for each weight
    (`DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory`, `Init.partition`).
    """
    zero, size = work.zero, ("bytes", work.zero.dtype_bytes)
    count = work.sharded(work.shape.parameter_count, from_stage=3)
    trained = work.sharded(work.shape.trained.all, from_stage=3)
    place = _OFFLOAD_PLACES[zero.param_offload]
    term = state_term("parameters", place, ("parameters of this rank", count), size)
    if place == "device":
        return (term,)
    if place == "host":
        blocks = (pinned_block(size, zero.largest_rounded_block) for size in _blocks_of_ranges(work, zero.dtype_bytes))
        more = sum(blocks) - trained * zero.dtype_bytes
        more += 0 if _trains_all(work) else _rounding_of_weights(work)
        return (term, *rounding_term("parameters", more))
    return (term, *nvme.parameters_on_the_way(work))


def parameter_blocks(work: Workload) -> Terms:
    """While the engine is built: the shard of each weight in a pinned block, before all are put into one. torch keeps
    such blocks until it is told to give them back, which is before the optimizer makes its moments: where these are on
    the host and take more, the host never needs both."""
    zero = work.zero
    if zero.param_offload != "cpu" or not zero.pins_parameters or not _trains_all(work):
        return ()
    elements = work.sharded(work.shape.parameter_count, from_stage=3)
    factors = ("parameters of this rank", elements), ("bytes", zero.dtype_bytes)
    blocks = product_term("parameter_blocks", "host", *factors, kind="reserve")
    terms = (blocks, *rounding_term(blocks.name, _rounding_of_weights(work)))
    moments = zero.optimizer_moments * elements * _FP32_BYTES if zero.optimizer_offload == "cpu" else 0
    return terms if total_bytes(terms) > moments else ()


def _trains_all(work: Workload) -> bool:
    return work.shape.trained.all == work.shape.parameter_count


def _rounding_of_weights(work: Workload) -> int:
    """Of the weights' shards, each in a pinned block of its own."""
    zero = work.zero
    if not zero.pins_parameters:
        return 0
    return rounding_of_shards(work.shape, zero.dp_world_size, zero.dtype_bytes, zero.largest_rounded_block)


def gathered_parameters(work: Workload, phase: Literal["forward", "loss", "backward"]) -> Terms:
    """Stage 3: the whole parameters that are there at the last layer, in its forward or its backward, or at the loss.

    DeepSpeed frees a module's parameters after it has run, unless one of the modules that follow uses them again before
    `stage3_max_reuse_distance` elements have gone by (`PartitionedParameterCoordinator.__params_to_release`). So the
    last layers and the head may stay from the forward to the backward. Modules to come are gathered before they run, up
    to `stage3_prefetch_bucket_size` elements, where fewer than `stage3_max_live_parameters` are there. Persistent ones
    are never freed before the optimizer's step, which shards all; they have a term of their own.
    """
    if work.zero.stage < 3:
        return ()
    shape, zero, persistent = work.shape, work.zero, persistent_counts(work)
    layer, head = shape.layer_parameter_count - persistent.layer, shape.head_weight_count - persistent.head
    kept = _layers_until_backward(work)
    count = max(1, kept) * layer
    if _keeps_embedding(work, phase):
        count += shape.embedding_parameter_count - persistent.embedding
    prefetch = min(zero.stage3_prefetch_bucket_size, max(0, zero.stage3_max_live_parameters - count))
    if phase == "forward":
        # The head comes next: one weight, which is gathered whole.
        count += head if prefetch else 0
    else:
        count += prefetch if kept < shape.num_hidden_layers else 0
    if phase == "loss":
        count += head - (0 if kept else layer)
    live = {
        "persistent_parameters": ("persistent parameters", persistent.all),
        "gathered_parameters": ("live parameters", min(shape.parameter_count - persistent.all, count)),
    }
    return tuple(
        state_term(name, "device", elements, ("bytes", zero.dtype_bytes))
        for name, elements in live.items()
        if elements[1]
    )


def _layers_until_backward(work: Workload) -> int:
    """The last layers, whose parameters stay from their forward to their backward."""
    distance = work.zero.stage3_max_reuse_distance - 2 * work.shape.head_weight_count
    return max(0, min(work.shape.num_hidden_layers, ceil_divide(distance, _PASSES * work.shape.layer_parameter_count)))


def _keeps_embedding(work: Workload, phase: str) -> bool:
    """Whether the embedding stays until it is used again: in its backward, or before that as the head's weight."""
    shape, layers = work.shape, work.shape.num_hidden_layers * work.shape.layer_parameter_count
    if shape.head_parameter_count:
        distance = _PASSES * layers + 2 * shape.head_parameter_count
    elif phase == "loss":
        return False  # it counts as the head's weight
    else:
        distance = layers if phase == "forward" else (_PASSES - 1) * layers
    return distance < work.zero.stage3_max_reuse_distance


def has_gradients_from_start(work: Workload) -> bool:
    """Whether memory for all gradients is there before the backward: stage 3 allocates it at the start, and of several
    micro-batches the first leaves its own."""
    return work.zero.stage == 3 or work.zero.gradient_accumulation_steps > 1


def gradients(work: Workload, *, so_far: int | None = None) -> Terms:
    """The gradients kept for the step, in the dtype in which they are summed.

    All of them below stage 2; from there on a shard, whose memory is taken whole with its first gradient, and which
    goes where the optimizer is. At stage 2 the optimizer on the host has its own place for them, and beside it are only
    sums of several micro-batches, a block for each weight.

    Args:
        so_far: trained parameters whose gradients are there already. None: all.
    """
    zero, count = work.zero, work.shape.trained.all
    if zero.stage < 2:
        count = min(count, so_far) if so_far is not None else count
        return (state_term("gradients", "device", ("gradients of this rank", count), ("bytes", _whole_bytes(work))),)
    if zero.stage == 2 and not _sums_in_fp32(work):
        return _gradients_of_weights(work)
    place: Place = "device" if zero.optimizer_offload == "none" or zero.stage == 2 else "host"
    of_rank = ("gradients of this rank", work.sharded(count, from_stage=2))
    term = state_term("gradients", place, of_rank, ("bytes", zero.grad_accum_dtype_bytes))
    return _pinned_with_optimizer(work, term) if place == "host" else (term,)


def _gradients_of_weights(work: Workload) -> Terms:
    """At stage 2 a rank has whole weights' gradients, also of those that lie in its range in part
    (`copy_grads_in_partition`, `async_accumulate_grad_in_cpu_via_gpu`)."""
    zero = work.zero
    elements, blocks = weights_of_ranges(
        work.shape, zero.dp_world_size, zero.dtype_bytes, largest_rounded=zero.largest_rounded_block
    )
    factors = ("gradients of this rank's weights", elements), ("bytes", zero.dtype_bytes)
    if zero.optimizer_offload == "none":
        return (state_term("gradients", "device", *factors),)
    if zero.gradient_accumulation_steps == 1:
        return ()
    term = state_term("gradients", "host", *factors)
    return (term, *rounding_term(term.name, blocks - term.bytes)) if zero.pins_optimizer else (term,)


def other_gradients(work: Workload) -> Terms:
    """What is on the device in the backward beside the gradients that are kept for the step."""
    on_nvme = work.zero.stage == 3 and work.zero.optimizer_offload == "nvme"
    return nvme.gradients_on_device(work) if on_nvme else _micro_batch_gradients(work)


def _micro_batch_gradients(work: Workload) -> Terms:
    """At stage 2 a micro-batch's own gradients, which are on the device until its backward has ended. Those of the only
    micro-batch are what is kept for the step, or go to the host one by one, and those of the last go there, too.

    A gradient that fits into the reduce bucket is a view into it. Only where gradients stay on the device in their own
    dtype is each copied out of it (`copy_grads_in_partition`).
    """
    zero = work.zero
    on_device, sums_in_fp32 = zero.optimizer_offload == "none", _sums_in_fp32(work)
    is_summed = zero.gradient_accumulation_steps > 1 or (sums_in_fp32 and on_device)
    if zero.stage != 2 or not is_summed:
        return ()
    in_bucket = 0 if on_device and not sums_in_fp32 else zero.reduce_bucket_size
    elements, _ = weights_of_ranges(work.shape, zero.dp_world_size, zero.dtype_bytes, larger_than=in_bucket)
    factors = ("gradients of this rank's weights", elements), ("bytes", zero.dtype_bytes)
    return (state_term("micro_batch_gradients", "device", *factors),) if elements else ()


def _sums_in_fp32(work: Workload) -> bool:
    """At stage 2 the gradients of a model in 16 bits are then one flat fp32 shard on the device, wherever the optimizer
    is (`_use_compact_grad_partition_buffer`)."""
    return work.zero.dtype_bytes < work.zero.grad_accum_dtype_bytes == _FP32_BYTES


def gradient_reduction(work: Workload) -> Terms:
    """What below stage 2 is there beside all gradients when they are averaged after the backward: a flat copy, of up to
    500 million elements without ZeRO, and at stage 1 of those that this rank's optimizer needs."""
    zero, count = work.zero, work.shape.trained.all
    if zero.stage > 1 or zero.dp_world_size == 1 or _has_fp32_gradient_on_host(work):
        return ()
    copied = min(count, _ALL_REDUCE_ELEMENTS) if zero.stage == 0 else work.sharded(count, from_stage=1)
    return (state_term("averaged_gradients", "device", ("gradients", copied), ("bytes", _whole_bytes(work))),)


def _whole_bytes(work: Workload) -> int:
    """Of an element of all gradients: at stage 1 each becomes a sum as soon as it is there, and takes its dtype
    (`_fill_param_grad_accum_attribute`)."""
    zero = work.zero
    return max(zero.dtype_bytes, zero.grad_accum_dtype_bytes) if zero.stage == 1 else zero.dtype_bytes


def _has_fp32_gradient_on_host(work: Workload) -> bool:
    return work.zero.optimizer_offload != "none"


def _pinned_with_optimizer(work: Workload, term: MemoryTerm, blocks: Iterable[int] | None = None) -> Terms:
    return pinned(term, work.zero, blocks, is_pinned=work.zero.pins_optimizer)


def _blocks_of_ranges(work: Workload, element_bytes: int) -> list[int]:
    return [elements * element_bytes for elements in ranges(work.shape, work.zero.dp_world_size)]


def _sub_groups(work: Workload) -> tuple[int, ...]:
    return sub_groups(work.shape, work.zero.dp_world_size, work.zero.sub_group_size)


def reduce_bucket(work: Workload) -> Terms:
    """The contiguous buffer that gradients are reduced from; stages 1 and 2 have two where they overlap."""
    if work.zero.stage == 0:
        return ()
    buffers = 2 if work.zero.overlap_comm and work.zero.stage < 3 else 1
    return (
        state_term(
            "reduce_bucket",
            "device",
            ("buffers", buffers),
            ("reduce_bucket_size", work.zero.reduce_bucket_size),
            ("bytes", work.zero.dtype_bytes),
        ),
    )


def optimizer_states(work: Workload) -> Terms:
    """The optimizer's moments, two of AdamW, and the fp32 master parameters, sharded from stage 1 on.

    On the host the fp32 gradient has its place from the start, and at stages 1 and 2 what the master parameters are
    copied through; there gradients go to the host by way of a buffer on either side, as large as the largest weight.
    Pinned is what goes over the link: gradients, at stage 3 a block for each sub-group; at stages 1 and 2 the master
    parameters and all buffers, too. Of NVMe see `nvme.optimizer_states`.
    """
    zero = work.zero
    count = work.sharded(work.shape.trained.all, from_stage=1)
    place = _OFFLOAD_PLACES[zero.optimizer_offload]
    if place == "nvme" and zero.stage == 3:
        return nvme.optimizer_states(work)
    of_rank = ("trained parameters of this rank", count)
    moments = _moments_in_8_bits(work) if zero.moments_in_8_bits else _moments(work, place, count)
    # Every ZeRO stage has a master copy, of fp32 parameters too; only plain fp32 is updated in place.
    if zero.stage == 0 and zero.dtype == "fp32":
        return moments
    master = state_term("master_parameters", place, of_rank, ("bytes", _FP32_BYTES))
    if not _has_fp32_gradient_on_host(work):
        return (master, *moments)
    gradient = state_term("fp32_gradient", "host", of_rank, ("bytes", _FP32_BYTES))
    if zero.stage == 3:
        blocks = (elements * _FP32_BYTES for elements in _sub_groups(work))
        return (master, *moments, *_pinned_with_optimizer(work, gradient, blocks))
    largest = ("largest weight", work.shape.trained.largest)
    in_fp32, staged = (_blocks_of_ranges(work, count) for count in (_FP32_BYTES, zero.dtype_bytes))
    size = ("bytes", zero.dtype_bytes)
    staging = state_term("parameter_staging", "host", of_rank, size)
    return (
        *moments,
        *_pinned_with_optimizer(work, master, in_fp32),
        *_pinned_with_optimizer(work, gradient, in_fp32),
        *_pinned_with_optimizer(work, staging, staged),
        *_pinned_with_optimizer(work, state_term("gradient_staging_on_host", "host", largest, size)),
        state_term("gradient_staging", "device", largest, size),
    )


def optimizer_step(work: Workload) -> Terms:
    """The gradients, and what the step itself needs: a flat fp32 copy of them. A fused AdamW needs nothing more.

    At stage 3 the step walks the shard in sub-groups.
    """
    zero = work.zero
    if zero.stage == 0:
        return gradients(work)
    bucket = reduce_bucket(work) if zero.stage == 3 else ()
    if _has_fp32_gradient_on_host(work):
        more = (*nvme.first_moments(work), *nvme.gradients_that_stay(work)) if zero.optimizer_offload == "nvme" else ()
        return (*bucket, *(gradients(work) if zero.stage > 1 else ()), *more)
    count = work.sharded(work.shape.trained.all, from_stage=1)
    if zero.stage == 2 and _sums_in_fp32(work):
        return gradients(work)  # they are flat, and in fp32
    if zero.stage == 3:
        count = max(_sub_groups(work))
    copy = state_term("fp32_gradient", "device", ("trained parameters of this step", count), ("bytes", _FP32_BYTES))
    flat = _flat_gradient(work)
    if zero.stage == 1:
        # Those of the other ranks' parameters are freed before the copy is made.
        elements, _ = weights_of_ranges(work.shape, zero.dp_world_size, zero.dtype_bytes)
        factors = ("gradients of this rank's weights", elements), ("bytes", zero.dtype_bytes)
        own = state_term("gradients", "device", *factors)
        return max(gradients(work), (own, *flat, copy), key=total_bytes)
    return (*gradients(work), *flat, copy, *bucket)


def _moments(work: Workload, place: Place, count: int) -> Terms:
    number = ("moments", work.zero.optimizer_moments)
    if not number[1]:
        return ()
    of_rank = ("trained parameters of this rank", count)
    return (state_term("optimizer_moments", place, number, of_rank, ("bytes", _FP32_BYTES)),)


def _moments_in_8_bits(work: Workload) -> Terms:
    """On the device: bytes, with a scale for each block, of every tensor that the optimizer has: a weight without ZeRO,
    what a rank has of a group or a sub-group with it. Of small ones they are in fp32, as ever."""
    zero, number = work.zero, ("moments", work.zero.optimizer_moments)
    if zero.stage == 0:
        tensors = weights_one_by_one(work.shape)
    else:
        tensors = _sub_groups(work) if zero.stage == 3 else ranges(work.shape, zero.dp_world_size)
    large = [elements for elements in tensors if elements >= LEAST_OF_8_BITS]
    blocks = sum(ceil_divide(elements, BLOCK_OF_8_BITS) for elements in large)
    terms = (
        state_term("optimizer_moments", "device", number, ("elements in 8 bits", sum(large)), ("bytes", 1)),
        state_term("optimizer_scales", "device", number, ("blocks", blocks), ("bytes", _FP32_BYTES)),
        state_term("small_moments", "device", number, ("others", sum(tensors) - sum(large)), ("bytes", _FP32_BYTES)),
    )
    return tuple(term for term in terms if term.bytes)


def _flat_gradient(work: Workload) -> Terms:
    """The gradients of a group or a sub-group in one tensor, of which the fp32 copy is made; then it is freed
    (`step`, `_prepare_fp32_grad_for_sub_group`). In fp32 it is the copy."""
    zero = work.zero
    element_bytes = zero.grad_accum_dtype_bytes if zero.stage == 3 or _sums_in_fp32(work) else zero.dtype_bytes
    if element_bytes == _FP32_BYTES:
        return ()
    of_groups = _sub_groups(work) if zero.stage == 3 else ranges(work.shape, zero.dp_world_size)
    count = "trained parameters of the largest group", max(of_groups)
    return (state_term("flat_gradient", "device", count, ("bytes", element_bytes)),)

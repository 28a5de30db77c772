"""Memory terms of the host and the device on the way to NVMe, which only stage 3 of ZeRO has."""

from __future__ import annotations

from itertools import accumulate

from mst_ds.geometry import ceil_divide
from mst_ds.planner.pinned import pinned
from mst_ds.planner.types import MemoryTerm, Place, state_term
from mst_ds.planner.weights import sub_groups, weights_of_sub_groups
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]

_FP32_BYTES = 4


def require_buffers(work: Workload) -> None:
    """
    Raises:
        ValueError: buffers that are too short or too few, with which DeepSpeed ends at its first use of them.
    """
    zero = work.zero
    if zero.stage < 3:
        return
    if zero.param_offload == "nvme":
        shards = (count for group in _groups(work) for sub_group in group for count in sub_group)
        longest = max((count for count in shards if count * zero.dtype_bytes >= zero.nvme_least_bytes), default=0)
        if longest > zero.param_buffer_size:
            raise ValueError(
                f"zero_optimization.offload_param.buffer_size is {zero.param_buffer_size}, less than the largest "
                f"weight's shard; allowed: {longest} or more"
            )
    least = (zero.optimizer_moments + 2) * zero.optimizer_swaps_at_once
    if zero.optimizer_offload == "nvme" and zero.optimizer_buffer_count < least:
        raise ValueError(
            f"zero_optimization.offload_optimizer.buffer_count is {zero.optimizer_buffer_count}, less than master "
            f"parameters, gradient and {zero.optimizer_moments} moments need, once more for each of pipeline_read and "
            f"pipeline_write; allowed: {least} or more"
        )


def parameters_on_the_way(work: Workload) -> Terms:
    """What of parameters on NVMe the host has: those that need not go there, in a flat pinned block for each group of
    the optimizer; of the others the weights that are too small for a file, each pinned; the buffers through which
    parameters come, and one through which a sub-group returns from the optimizer's step
    (`AsyncPartitionedParameterSwapper`, `_create_fp16_partitions_with_defragmentation`).
    """
    zero, size = work.zero, ("bytes", work.zero.dtype_bytes)
    room, blocks, gone = zero.param_max_in_cpu, [], []
    for group in _groups(work):
        blocks.append(min(room, sum(map(sum, group))))
        room -= blocks[-1]
        # Those that end within the block lie in it.
        ends = accumulate(map(sum, group))
        gone += [sub_group for sub_group, end in zip(group, ends, strict=True) if end > blocks[-1]]
    on_host = state_term("parameters_on_host", "host", ("parameters on the host", sum(blocks)), size)
    terms = [*pinned(on_host, zero, [count * zero.dtype_bytes for count in blocks])]
    buffers = ("buffer_count", zero.param_buffer_count), ("buffer_size", _aligned(work, zero.param_buffer_size))
    terms.append(state_term("parameter_swap_buffers", "host", *buffers, size))
    if not gone:
        return tuple(terms)
    small = [count for group in gone for count in group if count * zero.dtype_bytes < zero.nvme_least_bytes]
    of_small = state_term("small_parameters_on_host", "host", ("parameters of small weights", sum(small)), size)
    terms += (
        pinned(of_small, zero, [count * zero.dtype_bytes for count in small]) if zero.pins_parameters else [of_small]
    )
    largest = max((sub_group for group in _groups(work) for sub_group in group), key=sum)
    returning = sum(_aligned(work, count) for count in largest)
    terms.append(
        state_term("parameter_return_buffer", "host", ("parameters of the largest sub-group", returning), size)
    )
    return tuple(term for term in terms if term.bytes)


def optimizer_states(work: Workload) -> Terms:
    """Master parameters and moments of the sub-groups that are large enough for a file, and on the host of the others,
    with an fp32 gradient; and buffers of the largest sub-group, through which all states and the fp32 gradient of one
    come (`OptimizerSwapper`, `_create_fp32_partitions`, `initialize_optimizer_states`). DeepSpeed locks these itself:
    they are not rounded.
    """
    zero, groups = work.zero, sub_groups(work.shape, work.zero.dp_world_size, work.zero.sub_group_size)
    swapped = [count for count in groups if _is_swapped(work, count)]
    kept = [count for count in groups if not _is_swapped(work, count)]
    terms: list[MemoryTerm] = []
    places: tuple[tuple[str, Place, list[int]], ...] = (("", "nvme", swapped), ("_on_host", "host", kept))
    for suffix, place, counts in places:
        of_rank = ("trained parameters of sub-groups", sum(counts))
        moments = ("moments", zero.optimizer_moments)
        terms.append(state_term(f"master_parameters{suffix}", place, of_rank, ("bytes", _FP32_BYTES)))
        terms.append(state_term(f"optimizer_moments{suffix}", place, moments, of_rank, ("bytes", _FP32_BYTES)))
    gradient = state_term("fp32_gradient", "host", ("small sub-groups", sum(kept)), ("bytes", _FP32_BYTES))
    blocks = [count * _FP32_BYTES for count in kept]
    terms += pinned(gradient, zero, blocks, is_pinned=zero.pins_optimizer)
    sub_group = ("trained parameters of the largest sub-group", _aligned(work, max(groups), _FP32_BYTES))
    buffers = ("buffer_count", zero.optimizer_buffer_count), sub_group, ("bytes", _FP32_BYTES)
    terms.append(state_term("optimizer_swap_buffers", "host", *buffers))
    return tuple(term for term in terms if term.bytes)


def first_moments(work: Workload) -> Terms:
    """In the first step the optimizer makes a sub-group's moments before they have a file."""
    counts = sub_groups(work.shape, work.zero.dp_world_size, work.zero.sub_group_size)
    swapped = [count for count in counts if _is_swapped(work, count)]
    if not swapped or not work.zero.optimizer_moments:
        return ()
    factors = ("moments", work.zero.optimizer_moments), ("trained parameters of the largest sub-group", max(swapped))
    return (state_term("first_moments", "host", *factors, ("bytes", _FP32_BYTES)),)


def gradients_on_device(work: Workload) -> Terms:
    """In the backward the fp32 gradients of what is reduced together, which then go to their file, beside those that
    stay (`_offload_grad_partition_at_boundary`)."""
    weights, zero = _swapped_weights(work), work.zero
    together = max(ceil_divide(zero.reduce_bucket_size, zero.dp_world_size), max(weights, default=0))
    leaving = ("gradients reduced together", min(sum(weights), together))
    term = state_term("fp32_gradients_leaving", "device", leaving, ("bytes", _FP32_BYTES))
    return (*((term,) if term.bytes else ()), *gradients_that_stay(work))


def gradients_that_stay(work: Workload) -> Terms:
    """The fp32 gradients that no file takes are on the device until the step: of weights too small, or with a rest that
    fills no block, which is a view of the whole (`_adjust_for_misaligned_lengths`)."""
    least, alignment = work.zero.nvme_least_bytes, work.zero.nvme_alignment
    sizes = [count * _FP32_BYTES for count in _swapped_weights(work)]
    count = sum(size for size in sizes if size < least or size % alignment) // _FP32_BYTES
    factors = ("gradients without a file", count), ("bytes", _FP32_BYTES)
    return (state_term("fp32_gradients_on_device", "device", *factors),) if count else ()


def _swapped_weights(work: Workload) -> list[int]:
    sub_groups_of_all = (sub_group for group in _groups(work) for sub_group in group)
    return [count for sub_group in sub_groups_of_all if _is_swapped(work, sum(sub_group)) for count in sub_group]


def _is_swapped(work: Workload, count: int) -> bool:
    return count * _FP32_BYTES >= work.zero.nvme_least_bytes


def _groups(work: Workload) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return weights_of_sub_groups(work.shape, work.zero.dp_world_size, work.zero.sub_group_size)


def _aligned(work: Workload, count: int, element_bytes: int | None = None) -> int:
    """Elements, as reads and writes want them."""
    multiple = work.zero.nvme_alignment // (element_bytes or work.zero.dtype_bytes)
    return ceil_divide(count, multiple) * multiple

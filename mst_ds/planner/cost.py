"""How long a step takes at given rates: what ranks the planner's choices."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mst_ds.geometry import ceil_divide
from mst_ds.gpus import AS_PREDICTED, CPU, Attained, Gpu
from mst_ds.model_shape import flops_per_token
from mst_ds.planner.attention import key_value_width, output_width, projected_width, query_key_value_width
from mst_ds.planner.flops import attention_flops, matrix_flops
from mst_ds.planner.kept import copied_bytes
from mst_ds.planner.persistent import persistent_counts
from mst_ds.planner.rates import Rates, rates_of
from mst_ds.planner.traffic import launched_kernels, passed_bytes
from mst_ds.planner.workload import Workload, of_all_kinds

# Bytes/s of the host's memory for each rank of a node where its optimizer step runs, and of NVMe drives (assumptions).
_HOST_MEMORY_RATE = 50e9
_NVME_RATE = 1.5e9
# Queries of a block of torch's attention on a CPU.
_CPU_BLOCK = 256
_COLLECTIVE_SECONDS = 3e-5
_FP32_BYTES = 4


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step of this rank, by kind of work; all but the optimizer's are of one micro-batch.

    What the device computes is worked through one after another, with what it waits for. The rest runs beside that, and
    only counts where it takes longer.

    Attributes:
        matrices, attention, passes: computed.
        waits: for all-to-alls, and for the reduction of gradients where it does not overlap.
        collectives, host_copies, launches: beside it.
        launches_wait: whether each launch is waited for, as on a CPU, which runs ahead of no device.
    """

    micro_batches: int
    matrices: float
    attention: float
    passes: float
    waits: float
    collectives: float
    host_copies: float
    launches: float
    optimizer: float
    launches_wait: bool

    @property
    def computing(self) -> float:
        return self.matrices + self.attention + self.passes

    @property
    def waiting(self) -> float:
        return self.waits + (self.launches if self.launches_wait else 0.0)

    @property
    def of_micro_batch(self) -> float:
        return max(self.computing + self.waiting, self.collectives, self.host_copies, self.launches)

    @property
    def of_step(self) -> float:
        return self.micro_batches * self.of_micro_batch + self.optimizer

    def at(self, attained: Attained) -> StepTimes:
        """With these shares of the speed."""
        if attained == AS_PREDICTED:
            return self
        return StepTimes(
            self.micro_batches,
            matrices=self.matrices / attained.matrices,
            attention=self.attention / attained.attention,
            passes=self.passes / attained.passes,
            waits=self.waits / attained.links,
            collectives=self.collectives / attained.links,
            host_copies=self.host_copies / attained.links,
            launches=self.launches / attained.launches,
            optimizer=self.optimizer / attained.optimizer,
            launches_wait=self.launches_wait,
        )


def step_seconds(work: Workload, gpu: Gpu, *, fused: bool | None = None) -> float:
    """Predicted seconds of an optimizer step of this rank, see `step_times`."""
    return step_times(work, gpu, fused=fused).of_step


def step_times(work: Workload, gpu: Gpu, *, fused: bool | None = None) -> StepTimes:
    """Predicted.

    Args:
        fused: see `passed_bytes`; None: in 16 bits on a GPU.
    """
    rates = rates_of(work, gpu)
    fused = work.zero.dtype != "fp32" and gpu.capability >= (8, 0) if fused is None else fused
    forward, backward = attention_flops(work)
    reducing = _collective_seconds(work, rates, _reduced_bytes(work))
    collectives = _collective_seconds(work, rates, _gathered_bytes(work))
    waits = all_to_all_seconds(work, rates)
    if work.zero.overlap_comm:
        collectives += reducing
    else:
        waits += reducing
    # Of a block's queries all attend to what the last one does.
    more = 1.0 + (_CPU_BLOCK / work.seq_len if gpu.name == CPU.name else 0.0)
    return StepTimes(
        work.zero.gradient_accumulation_steps,
        matrices=matrix_flops(work) / rates.matrices,
        attention=more * (forward / rates.attention_forward + backward / rates.attention_backward),
        passes=(passed_bytes(work, fused=fused) + _summed_bytes(work) + _merged_bytes(work)) / rates.passes,
        waits=waits,
        collectives=collectives,
        host_copies=copied_bytes(work) / gpu.host_rate + _parameter_seconds(work, gpu),
        launches=launched_kernels(work) * rates.launch_seconds,
        optimizer=_optimizer_seconds(work, gpu, rates),
        launches_wait=gpu.name == CPU.name,
    ).at(gpu.attained)


def _parameter_seconds(work: Workload, gpu: Gpu) -> float:
    """Of a micro-batch: offloaded parameters come to the device twice."""
    if work.zero.param_offload == "none":
        return 0.0
    rate = gpu.host_rate if work.zero.param_offload == "cpu" else min(gpu.host_rate, _NVME_RATE)
    return 2 * _bytes_of_shard(work, from_stage=3) / rate


def model_flops_utilisation(work: Workload, gpu: Gpu, seconds: float) -> float:
    """MFU of a step of so many seconds: the model's own FLOPs, nothing computed a second time, of the data sheet's."""
    dense = gpu.fp32_flops if work.zero.dtype == "fp32" else gpu.flops
    # A sequence is worked on by sp_size ranks.
    tokens = work.seq_len * work.zero.micro_batch_size * work.zero.gradient_accumulation_steps / work.sp_size
    return flops_per_token(work.shape, work.seq_len // work.sequences_per_sample) * tokens / (dense * seconds)


@of_all_kinds
def all_to_all_seconds(work: Workload, rates: Rates) -> float:
    """Of a micro-batch: queries, keys and values to the ranks that have their heads, the outputs back, and in the
    backward all of these with the gradients of each."""
    if work.sp_size == 1:
        return 0.0
    inputs, output = query_key_value_width(work.shape), output_width(work.shape)
    layers = work.shape.num_hidden_layers
    # Forward; then the inputs again, the output, its gradient, and the gradients of the inputs.
    width = layers * (inputs + output + 2 * inputs + 2 * output)
    if work.settings.recompute:
        # Attention again; its keys and values are then there for the backward.
        width += (layers - work.attention_keeping_layers) * (inputs + output - key_value_width(work.shape))
    sent = work.tokens * width * work.zero.dtype_bytes
    # Ranks of a sequence group are neighbours; where nodes are no whole groups, the rank with fewest in its node waits
    # longest.
    is_one_node = work.zero.dp_world_size <= work.ranks_per_node
    inside = work.sp_size if is_one_node else math.gcd(work.sp_size, work.ranks_per_node)
    to_neighbours = sent * (inside - 1) / work.sp_size / rates.node
    to_others = sent * (work.sp_size - inside) / work.sp_size / rates.network
    exchanges = 5 * layers * work.layer_chunks * work.settings.head_groups
    return max(to_neighbours, to_others) + exchanges * _COLLECTIVE_SECONDS


def _summed_bytes(work: Workload) -> int:
    """Of a micro-batch: each chunk but the first reads and writes the sums of its weights' gradients in fp32, those of
    a layer all of the layer's, those of an MLP, of which a layer's chunk has several, the MLP's."""
    weights = _weights_summed(work) + work.shape.trained.head * (work.settings.loss_chunks - 1)
    return 2 * _FP32_BYTES * weights


@of_all_kinds
def _weights_summed(work: Workload) -> int:
    """Of all layers, how often each of their weights' sums is read and written."""
    shape, experts, settings = work.shape, work.shape.experts, work.settings
    again, of_layer = work.layer_chunks * settings.mlp_chunks - 1, work.layer_chunks - 1
    if shape.trained.mlp is not None:
        weights = shape.num_hidden_layers * shape.trained.mlp * again
    else:
        widths = shape.num_dense_layers * shape.intermediate_size * again
        if experts is not None:
            # A chunk is of one expert, which has several where there are more chunks than experts.
            of_expert = work.layer_chunks * ceil_divide(settings.mlp_chunks, experts.num_experts) - 1
            routed = experts.num_experts * experts.intermediate_size * of_expert
            widths += experts.num_sparse_layers * (routed + experts.shared_intermediate_size * again)
        weights = (3 if shape.gated_mlp else 2) * shape.hidden_size * widths
    if shape.is_trained_whole:
        projections = projected_width(shape) + output_width(shape)
        weights += of_layer * shape.num_hidden_layers * shape.hidden_size * projections
    return weights


@of_all_kinds
def _merged_bytes(work: Workload) -> int:
    """Of a micro-batch, with several chunks of a layer: in its backward each chunk, for each chunk before it, reads and
    writes the sums of its queries' gradients and of those of the other's keys and values, in fp32."""
    width = work.query_heads * work.shape.head_dim + work.key_value_width
    # A token's queries meet half of all chunks' keys, and its keys half of all queries.
    blocks = (work.layer_chunks - 1) / 2
    blocks *= work.shape.full_attention_layers
    return int(blocks * work.attention_tokens * width * (2 * _FP32_BYTES + work.zero.dtype_bytes))


def _collective_seconds(work: Workload, rates: Rates, moved: float) -> float:
    """An all-gather or a reduce-scatter of so many bytes over all ranks, in rings over all network cards of a node."""
    ranks = work.zero.dp_world_size
    rate = rates.node
    if ranks > work.ranks_per_node:
        rate = min(rate, rates.network * work.ranks_per_node)
    return moved * (ranks - 1) / ranks / rate


def _gathered_bytes(work: Workload) -> float:
    """Of a micro-batch: at stage 3 all parameters, for the forward and for the backward, but persistent ones once a
    step, after the optimizer; so are the trained ones at stages 1 and 2."""
    size = work.zero.dtype_bytes
    if work.zero.stage == 3:
        persistent = persistent_counts(work).all
        sharded = work.shape.parameter_count - persistent
        return (2.0 * sharded + persistent / work.zero.gradient_accumulation_steps) * size
    return work.shape.trained.all * size / work.zero.gradient_accumulation_steps if work.zero.stage else 0.0


def _reduced_bytes(work: Workload) -> float:
    """Of a micro-batch: gradients are reduced in each from stage 2 on, below it once a step; an all-reduce, at stage 0,
    is a reduce-scatter and an all-gather."""
    gradients = float(work.shape.trained.all * work.zero.dtype_bytes)
    if work.zero.stage >= 2:
        return gradients
    return (1 if work.zero.stage else 2) * gradients / work.zero.gradient_accumulation_steps


def _bytes_of_shard(work: Workload, *, from_stage: int) -> int:
    return work.sharded(work.shape.parameter_count, from_stage) * work.zero.dtype_bytes


def _optimizer_seconds(work: Workload, gpu: Gpu, rates: Rates) -> float:
    """The optimizer reads the gradient and the master parameters in fp32, and its moments, and writes all but the
    first."""
    count = work.sharded(work.shape.trained.all, from_stage=1)
    of_moments = work.zero.optimizer_moments * (1 if work.zero.moments_in_8_bits else _FP32_BYTES)
    kept = (_FP32_BYTES + of_moments) * count
    touched = 2 * kept + _FP32_BYTES * count
    if work.zero.optimizer_offload == "none":
        return touched / rates.passes
    copied = 2 * count * work.zero.dtype_bytes / gpu.host_rate  # the gradients there, the parameters back
    on_drive = 2 * kept / _NVME_RATE if work.zero.optimizer_offload == "nvme" else 0.0
    return touched / _HOST_MEMORY_RATE + copied + on_drive

"""A request with something of it changed: other ranks, another stage, offload, a host with more memory, another GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mst_ds.adapter_flags import LORA_DROPOUT
from mst_ds.geometry import ceil_divide
from mst_ds.gpus import Gpu
from mst_ds.model_shape import ModelShape, TrainedCounts
from mst_ds.planner.attention import output_width
from mst_ds.planner.request import Request
from mst_ds.topology import Topology, divisors
from mst_ds.zero import OffloadDevice

# Of the host of a rank, where it may be as large as it takes.
ENDLESS = 2**62


def sp_sizes(request: Request, world_size: int) -> list[int]:
    """The numbers of ranks that can share a sequence, from 1 on; of a JSON that fixes the samples of a step those with
    which it has as many."""
    zero, samples = request.work.zero, request.samples_per_step
    sizes = [size for size in divisors(world_size) if size <= request.work.shape.max_sp_size]
    of_rank = zero.micro_batch_size * zero.gradient_accumulation_steps
    return sizes if samples is None else [size for size in sizes if of_rank * (world_size // size) == samples]


def nodes_of(request: Request) -> int:
    return ceil_divide(request.topology.world_size, request.work.ranks_per_node)


def with_nodes(request: Request, num_nodes: int, sp_size: int) -> Request:
    """Nodes like the weakest of these."""
    world_size = num_nodes * request.work.ranks_per_node
    zero = replace(request.work.zero, dp_world_size=world_size)
    return replace(
        request,
        work=request.work.with_zero(zero).with_settings(sp_size=sp_size),
        topology=Topology(0, world_size, sp_size),
        other_sp_sizes=(),
        device_memory=(request.least_device_memory,) * world_size,
    )


def lowest_stage(request: Request) -> int:
    """Of ZeRO: a run refuses stage 0 in 16 bits, which DeepSpeed trains wrong."""
    return 0 if request.work.zero.dtype == "fp32" else 1


def with_states(
    request: Request,
    *,
    stage: int | None = None,
    optimizer: OffloadDevice | None = None,
    parameters: OffloadDevice | None = None,
) -> Request:
    """Another ZeRO stage, another place for the optimizer's states and for the parameters; None: as it is."""
    zero = request.work.zero
    changed = replace(
        zero,
        stage=zero.stage if stage is None else stage,
        optimizer_offload=optimizer or zero.optimizer_offload,
        param_offload=parameters or zero.param_offload,
    )
    return replace(request, work=request.work.with_zero(changed))


def with_micro_batch(request: Request, sequences: int) -> Request | None:
    """Micro-batches of so many sequences, and as many in a step as before, or nearly; None where the JSON fixes them to
    another number."""
    zero = request.work.zero
    of_step = zero.micro_batch_size * zero.gradient_accumulation_steps
    if request.samples_per_step is not None and of_step % sequences:
        return None
    changed = replace(zero, micro_batch_size=sequences, gradient_accumulation_steps=ceil_divide(of_step, sequences))
    return replace(request, work=request.work.with_zero(changed))


def with_offloaded_activations(request: Request) -> Request:
    return replace(request, mst=replace(request.mst, given={**request.mst.given, "offload_activations": True}))


def with_endless_host(request: Request) -> Request:
    return replace(request, host_memory=ENDLESS)


def with_gpu(request: Request, gpu: Gpu) -> Request:
    return replace(
        request,
        work=replace(request.work, capability=gpu.capability),
        device_memory=(gpu.memory,) * request.topology.world_size,
        rates=gpu,
        times_are_known=True,
    )


def with_lora(request: Request, rank: int) -> Request | None:
    """With LoRA on all linear layers but the head; None where the config alone does not say which these are."""
    shape = lora_shape(request.work.shape, rank)
    return None if shape is None else replace(request, work=replace(request.work, shape=shape))


def lora_shape(shape: ModelShape, rank: int) -> ModelShape | None:
    """The model with adapters of this rank, as `mst_ds.structure.trained` counts it on the model itself; None for what
    has adapters already, and for layers that are not Llama's in kind."""
    is_plain = shape.counts_are_exact and shape.gated_mlp and not shape.has_fused_qkv and not shape.has_own_attention
    is_plain &= shape.layers_are_alike and not shape.layer_embedding_width
    if not (is_plain and shape.is_trained_whole and shape.experts is None):
        return None
    hidden, inner = shape.hidden_size, output_width(shape)
    keys = shape.num_key_value_heads * shape.head_dim
    values = shape.num_key_value_heads * shape.value_head_dim
    widths = [(hidden, shape.num_attention_heads * shape.head_dim), (hidden, keys), (hidden, values), (inner, hidden)]
    of_mlp = 3 * rank * (hidden + shape.intermediate_size)
    of_layer = of_mlp + rank * sum(map(sum, widths))
    of_all = shape.num_hidden_layers * of_layer
    largest = rank * max(shape.intermediate_size, *map(max, widths))
    trained = TrainedCounts(
        all=of_all,
        layer=of_layer,
        mlp=of_mlp,
        head=0,
        embedding=0,
        largest=largest,
        dropout_width=sum(width for width, _ in widths) if LORA_DROPOUT else 0,
    )
    return replace(
        shape,
        parameter_count=shape.parameter_count + of_all,
        layer_parameter_count=shape.layer_parameter_count + of_layer,
        trained=trained,
    )


def fewer_nodes(request: Request) -> Iterator[tuple[int, Request]]:
    """Half the nodes, a quarter ..., as long as their ranks can share sequences as these do."""
    nodes, sp_size = nodes_of(request), request.work.sp_size
    while nodes > 1:
        nodes = ceil_divide(nodes, 2)
        if sp_size not in sp_sizes(request, nodes * request.work.ranks_per_node):
            return
        yield nodes, with_nodes(request, nodes, sp_size)

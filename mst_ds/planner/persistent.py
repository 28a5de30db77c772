"""Parameters so small that stage 3 leaves them whole on every rank, from their first use to the optimizer's step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mst_ds.model_shape import ModelShape
from mst_ds.planner.workload import Workload


@dataclass(frozen=True)
class PersistentCounts:
    """Elements beside the rank's shard, which has a part of these too. all: of the model. layer: of the largest one."""

    all: int
    layer: int = 0
    embedding: int = 0
    head: int = 0


def persistent_counts(work: Workload) -> PersistentCounts:
    """At stage 3 the weights of at most `stage3_param_persistence_threshold` elements.

    The rule is that of DeepSpeed's `DeepSpeedZeRoOffload.mark_persistent_parameters`.
    Biases and gates of shared experts, which the shape does not tell, count as sharded, latent projections as plain
    ones. No more than `stage3_model_persistence_threshold` persist: where that is less, each part may be sharded.
    """
    shape, limit = work.shape, work.zero.stage3_param_persistence_threshold
    norm = _small(limit, [shape.hidden_size])
    norm_weights = 2 if shape.norms.kind == "layer" else 1
    beside_mlp = _small(limit, _attention_weights(shape))
    beside_mlp += norm_weights * (shape.norms.pre_norms + shape.norms.post_norms) * norm
    dense = _small(limit, _mlp_weights(shape, shape.intermediate_size))
    sparse = _small(limit, _expert_weights(shape))
    embedding = _small(limit, [shape.embedding_parameter_count])
    head = _small(limit, [shape.head_weight_count])
    num_dense, num_layers = shape.num_dense_layers, shape.num_hidden_layers
    total = num_layers * beside_mlp + num_dense * dense + (num_layers - num_dense) * sparse + norm_weights * norm
    total += embedding + (head if shape.head_parameter_count else 0)
    most = min(shape.parameter_count, work.zero.stage3_model_persistence_threshold)
    if total > most:
        return PersistentCounts(all=most)
    of_mlp = sparse if num_dense < num_layers else dense
    return PersistentCounts(total, min(shape.layer_parameter_count, beside_mlp + of_mlp), embedding, head)


def weights(shape: ModelShape) -> Iterator[tuple[int, int]]:
    """The elements of a weight, and how many weights have as many; without biases and gates of shared experts."""
    num_layers, num_dense = shape.num_hidden_layers, shape.num_dense_layers
    norms = num_layers * (shape.norms.pre_norms + shape.norms.post_norms) + 1
    yield shape.hidden_size, norms * (2 if shape.norms.kind == "layer" else 1)
    of_layers = (
        (_attention_weights(shape), num_layers),
        (_mlp_weights(shape, shape.intermediate_size), num_dense),
        (_expert_weights(shape), num_layers - num_dense),
    )
    for sizes, layers in of_layers:
        for size in sizes:
            yield size, layers
    yield shape.embedding_parameter_count, 1
    if shape.head_parameter_count:
        yield shape.head_parameter_count, 1


def _small(limit: int, sizes: list[int]) -> int:
    return sum(size for size in sizes if size <= limit)


def _attention_weights(shape: ModelShape) -> list[int]:
    query = shape.hidden_size * shape.num_attention_heads * shape.head_dim
    key = shape.hidden_size * shape.num_key_value_heads * shape.head_dim
    value = shape.hidden_size * shape.num_key_value_heads * shape.value_head_dim
    output = shape.hidden_size * shape.num_attention_heads * shape.value_head_dim
    return [query + key + value, output] if shape.has_fused_qkv else [query, key, value, output]


def _mlp_weights(shape: ModelShape, intermediate_size: int) -> list[int]:
    return (3 if shape.gated_mlp else 2) * [shape.hidden_size * intermediate_size]


def _expert_weights(shape: ModelShape) -> list[int]:
    """Of a sparse layer: the router's, gate and up of all experts in one, down in another, and the shared MLP's."""
    if (experts := shape.experts) is None:
        return []
    down = experts.num_experts * experts.intermediate_size * shape.hidden_size
    shared = _mlp_weights(shape, experts.shared_intermediate_size) if experts.shared_intermediate_size else []
    return [experts.num_experts * shape.hidden_size, (2 if shape.gated_mlp else 1) * down, down, *shared]

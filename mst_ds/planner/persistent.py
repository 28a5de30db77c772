"""Parameters so small that stage 3 leaves them whole on every rank, from their first use to the optimizer's step."""

from __future__ import annotations

from dataclasses import dataclass

from mst_ds.planner.weights import attention_weights, expert_weights, mlp_weights
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
    beside_mlp = _small(limit, attention_weights(shape))
    beside_mlp += norm_weights * (shape.norms.pre_norms + shape.norms.post_norms) * norm
    dense = _small(limit, mlp_weights(shape, shape.intermediate_size))
    sparse = _small(limit, expert_weights(shape))
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


def _small(limit: int, sizes: list[int]) -> int:
    return sum(size for size in sizes if size <= limit)

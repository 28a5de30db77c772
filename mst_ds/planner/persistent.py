"""Parameters so small that stage 3 leaves them whole on every rank, from their first use to the optimizer's step."""

from __future__ import annotations

from dataclasses import dataclass

from mst_ds.model_shape import ModelShape
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
    of_norms = norm_weights * (shape.norms.pre_norms + shape.norms.post_norms) * norm
    of_layers = [
        (of_norms + _small(limit, attention_weights(kind)), *_small_of_mlps(limit, kind), kind) for kind in shape.kinds
    ]
    embedding = _small(limit, [shape.embedding_parameter_count])
    head = _small(limit, [shape.head_weight_count])
    total = norm_weights * norm
    for beside_mlp, dense, sparse, kind in of_layers:
        num_dense, num_layers = kind.num_dense_layers, kind.num_hidden_layers
        total += num_layers * beside_mlp + num_dense * dense + (num_layers - num_dense) * sparse
    total += embedding + (head if shape.head_parameter_count else 0)
    most = min(shape.parameter_count, work.zero.stage3_model_persistence_threshold)
    if total > most:
        return PersistentCounts(all=most)
    of_layer = max(
        beside_mlp + (sparse if kind.num_dense_layers < kind.num_hidden_layers else dense)
        for beside_mlp, dense, sparse, kind in of_layers
    )
    return PersistentCounts(total, min(shape.layer_parameter_count, of_layer), embedding, head)


def _small_of_mlps(limit: int, shape: ModelShape) -> tuple[int, int]:
    """Of a dense layer's MLP, and of a sparse layer's experts."""
    return _small(limit, mlp_weights(shape, shape.intermediate_size)), _small(limit, expert_weights(shape))


def _small(limit: int, sizes: list[int]) -> int:
    return sum(size for size in sizes if size <= limit)

"""The weights of a model one by one, and how DeepSpeed divides them: among ranks, and for the optimizer's step."""

from __future__ import annotations

from functools import cache

from mst_ds.geometry import ceil_divide, pinned_block
from mst_ds.model_shape import ModelShape

# Ranges of ranks begin at multiples of so many elements (`nccl_start_alignment_factor`).
_ALIGNMENT = 2


@cache
def weights_one_by_one(shape: ModelShape) -> tuple[int, ...]:
    """The elements of each trained weight, see `_optimizer_groups`."""
    return tuple(size for group in _optimizer_groups(shape) for size in group)


@cache
def ranges(shape: ModelShape, ranks: int) -> tuple[int, ...]:
    """The elements that a rank has of each of the optimizer's groups."""
    return tuple(_range(group, ranks) for group in _optimizer_groups(shape))


@cache
def weights_of_ranges(
    shape: ModelShape, ranks: int, dtype_bytes: int, *, larger_than: int = 0, largest_rounded: int = 0
) -> tuple[int, int]:
    """The weights that stages 1 and 2 give to a rank: those that lie in its range, whole or in part.

    Args:
        larger_than: elements; weights of so many or fewer are left out.
        largest_rounded: see `pinned_block`.

    Returns:
        Their elements, and the bytes of their blocks if each is pinned whole; both of the rank that has most.
    """
    elements, blocks = [0] * ranks, [0] * ranks
    for group in _optimizer_groups(shape):
        start, length = 0, _range(group, ranks)
        for size in group:
            if size > larger_than:
                for rank in range(start // length, ceil_divide(start + size, length)):
                    elements[rank] += size
                    blocks[rank] += pinned_block(size * dtype_bytes, largest_rounded)
            start += size
    return max(elements), max(blocks)


@cache
def weights_of_sub_groups(shape: ModelShape, ranks: int, least: int) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """By groups of the optimizer, what stage 3 steps at a time, and of that the shards of weights: as many weights as
    make `sub_group_size` elements or more, the last of a group fewer (`_create_fp16_sub_groups`)."""
    groups = []
    for group in _optimizer_groups(shape):
        found, shards = [], []
        for size in group:
            shards.append(ceil_divide(size, ranks))
            if sum(shards) >= least:
                found.append(tuple(shards))
                shards = []
        groups.append((*found, *([tuple(shards)] if shards else [])))
    return tuple(groups)


@cache
def sub_groups(shape: ModelShape, ranks: int, least: int) -> tuple[int, ...]:
    """The elements of a rank that stage 3 steps at a time."""
    return tuple(sum(shards) for group in weights_of_sub_groups(shape, ranks, least) for shards in group)


@cache
def rounding_of_shards(shape: ModelShape, ranks: int, dtype_bytes: int, largest_rounded: int) -> int:
    """Bytes of the blocks of all weights' shards, each pinned by itself, beyond those of the shards."""
    shards = (ceil_divide(size, ranks) * dtype_bytes for size in (*_matrices(shape), *_norms(shape)))
    return sum(pinned_block(count, largest_rounded) - count for count in shards)


def _range(group: list[int], ranks: int) -> int:
    return ceil_divide(sum(group), _ALIGNMENT * ranks) * _ALIGNMENT


def _optimizer_groups(shape: ModelShape) -> tuple[list[int], list[int]]:
    """The elements of each trained weight, in the model's order: of those that are decayed, and of the others, as the
    engine's own optimizer has them. One of the JSON has them in one group, which moves ranges by little.

    Biases and gates of shared experts count as one weight. Where only some weights are trained, which is not told, all
    are as large as the largest.
    """
    trained = shape.trained
    if trained.all != shape.parameter_count:
        number, rest = divmod(trained.all, trained.largest)
        return [trained.largest] * number + [rest] * (rest > 0), []
    decayed, others = _matrices(shape), _norms(shape)
    rest = trained.all - sum(decayed) - sum(others)
    return decayed, others + [rest] * (rest > 0)


def _matrices(shape: ModelShape) -> list[int]:
    """Without gates of shared experts; dense layers are counted as the first ones, and layers by their kinds."""
    layers: list[int] = []
    for kind in shape.kinds:
        num_dense = kind.num_dense_layers
        dense = attention_weights(kind) + mlp_weights(kind, kind.intermediate_size)
        sparse = attention_weights(kind) + expert_weights(kind)
        layers += dense * num_dense + sparse * (kind.num_hidden_layers - num_dense)
    head = [shape.head_parameter_count] if shape.head_parameter_count else []
    tables = [shape.table_parameter_count] if shape.table_parameter_count else []
    return [shape.embedding_parameter_count, *layers, *head, *tables]


def _norms(shape: ModelShape) -> list[int]:
    norms = shape.num_hidden_layers * (shape.norms.pre_norms + shape.norms.post_norms) + 1
    return [shape.hidden_size] * (norms * (2 if shape.norms.kind == "layer" else 1))


def attention_weights(shape: ModelShape) -> list[int]:
    query = shape.hidden_size * shape.num_attention_heads * shape.head_dim
    key = shape.hidden_size * shape.num_key_value_heads * shape.head_dim
    value = shape.hidden_size * shape.num_key_value_heads * shape.value_head_dim
    output = shape.hidden_size * shape.num_attention_heads * shape.value_head_dim
    if shape.has_fused_qkv:
        return [query + key + value, output]
    layer = shape.layers[-1]
    own = [key] * layer.has_own_keys + [value] * (layer.has_own_keys and layer.has_value_projection)
    return [query, *own, output]


def mlp_weights(shape: ModelShape, intermediate_size: int) -> list[int]:
    return (3 if shape.gated_mlp else 2) * [shape.hidden_size * intermediate_size]


def expert_weights(shape: ModelShape) -> list[int]:
    """Of a sparse layer: the router's, gate and up of all experts in one, down in another, and the shared MLP's."""
    if (experts := shape.experts) is None:
        return []
    down = experts.num_experts * experts.intermediate_size * shape.hidden_size
    shared = mlp_weights(shape, experts.shared_intermediate_size) if experts.shared_intermediate_size else []
    return [experts.num_experts * shape.hidden_size, (2 if shape.gated_mlp else 1) * down, down, *shared]


def largest_layer_weight(shape: ModelShape) -> int:
    """Elements of the largest weight of a layer."""
    of_layers = [size for kind in shape.kinds for size in (*attention_weights(kind), *expert_weights(kind))]
    for kind in shape.kinds:
        of_layers += mlp_weights(kind, kind.intermediate_size) if kind.num_dense_layers else []
    return max(of_layers)

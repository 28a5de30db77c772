"""FLOPs of matrix products and of attention in a micro-batch of one rank; 2 for a product and its sum."""

from __future__ import annotations

from mst_ds.model_shape import attended_pairs
from mst_ds.planner.attention import output_width, projected_width
from mst_ds.planner.workload import Workload, of_all_kinds


def attention_forward_flops(work: Workload) -> int:
    """Of all layers, each over the whole sequences with this rank's heads, under a causal mask or a sliding window."""
    return _full_attention_flops(work) + windowed_attention_flops(work)


def attention_flops(work: Workload) -> tuple[int, int]:
    """Of all that attention computes in a micro-batch: forward, with what runs again, and backward, which is 2.5 times
    the first forward, as kernels compute its scores again."""
    first = attention_forward_flops(work)
    again = 0
    if work.settings.recompute:
        again = windowed_attention_flops(work)
        again += 0 if work.settings.keep_attention else _full_attention_flops(work)
    return first + again, 5 * first // 2


@of_all_kinds
def _full_attention_flops(work: Workload) -> int:
    return work.shape.full_attention_layers * _flops_of_window(work, work.seq_len)


@of_all_kinds
def windowed_attention_flops(work: Workload) -> int:
    """Of a forward of the layers with a sliding window."""
    return sum(_flops_of_window(work, window) for window in work.shape.sliding_windows)


def _flops_of_window(work: Workload, window: int) -> int:
    """Of one layer in which a token sees the last `window` tokens of its sequence."""
    sequences = work.zero.micro_batch_size * work.sequences_per_sample
    width = work.query_heads * (work.shape.head_dim + work.shape.value_head_dim)
    return 2 * sequences * attended_pairs(window, work.seq_len // work.sequences_per_sample) * width


def flops_computed_again(work: Workload) -> int:
    """What is computed a second time. In the MLP's backward gate and up, unless they are kept; with recompute
    projections and, unless it is kept, attention, and the MLP's output where a norm of it needs that."""
    inner, matrices = (2, 3) if work.shape.gated_mlp else (1, 2)
    kept = _kept_mlp_flops(work) * inner // matrices
    gate_up = _mlp_flops(work) * inner // matrices - kept + _unlike_mlp_flops(work) * (matrices - inner) // matrices
    if not work.settings.recompute:
        return gate_up
    again = gate_up + _projection_flops(work) + _flops_beside_residual(work)
    if work.shape.norms.post_norms:
        again += _mlp_flops(work) - kept
    if work.layer_chunks > 1:
        again += _projections_for_keys(work)
    return again + attention_flops(work)[0] - attention_forward_flops(work)


def micro_batch_flops(work: Workload) -> int:
    """Forward, backward, and what is computed a second time."""
    return matrix_flops(work) + sum(attention_flops(work))


def forward_matrix_flops(work: Workload) -> int:
    """Of a forward alone, outside attention."""
    head = 2 * work.tokens * work.shape.hidden_size * work.shape.vocab_size
    beside_layers = 2 * work.tokens * work.shape.products_beside_layers
    return _projection_flops(work) + _mlp_flops(work) + _flops_beside_residual(work) + beside_layers + head


def matrix_flops(work: Workload) -> int:
    """Of all matrix products outside attention in a micro-batch. A backward is twice the forward, less the gradients of
    weights that are not trained."""
    shape, forward = work.shape, forward_matrix_flops(work)
    of_weights = forward if shape.is_trained_whole else 2 * work.tokens * (shape.trained.all - shape.trained.embedding)
    attention_again = attention_flops(work)[0] - attention_forward_flops(work)
    return 2 * forward + of_weights + flops_computed_again(work) - attention_again


@of_all_kinds
def _projection_flops(work: Workload) -> int:
    """Queries, keys, values and the attention's output, and what a mixer has instead, of all layers."""
    shape, layer = work.shape, work.shape.layers[-1]
    weights = layer.has_attention * shape.hidden_size * (projected_width(shape) + output_width(shape))
    if layer.mixer is not None:
        weights += layer.mixer.matrix_elements
    return 2 * work.tokens * shape.num_hidden_layers * weights


def _flops_beside_residual(work: Workload) -> int:
    """What adds embeddings of layers and mixes hidden states, of all layers."""
    return 2 * work.tokens * work.shape.num_hidden_layers * work.shape.products_beside_residual


@of_all_kinds
def _projections_for_keys(work: Workload) -> int:
    """Where keys and values are not kept, a layer's chunks are computed up to there before its backward."""
    shape = work.shape
    layers = shape.num_hidden_layers - work.attention_keeping_layers
    return 2 * work.tokens * layers * shape.hidden_size * projected_width(shape)


def _mlp_flops(work: Workload) -> int:
    """The forward of all layers' MLPs; of experts those that a token is routed to."""
    experts = work.shape.experts
    if experts is None:
        return _dense_mlp_flops(work)
    routed = experts.num_sparse_layers * experts.num_experts_per_tok * experts.intermediate_size
    return _dense_mlp_flops(work) + _flops_of_mlps(work, routed)


@of_all_kinds
def _dense_mlp_flops(work: Workload) -> int:
    """The forward of the MLPs that every token goes through."""
    shape, experts = work.shape, work.shape.experts
    widths = shape.num_dense_layers * shape.intermediate_size
    if experts is not None:
        widths += experts.num_sparse_layers * experts.shared_intermediate_size
    return _flops_of_mlps(work, widths)


@of_all_kinds
def _unlike_mlp_flops(work: Workload) -> int:
    """The forward of the MLPs of which a chunk is computed again whole."""
    return 0 if work.shape.layers[-1].has_plain_mlp else _dense_mlp_flops(work)


@of_all_kinds
def _kept_mlp_flops(work: Workload) -> int:
    """The forward of the MLPs of which gate and up are kept."""
    keeps = work.settings.keep_mlp and work.shape.layers[-1].has_plain_mlp
    return _dense_mlp_flops(work) if keeps else 0


def _flops_of_mlps(work: Workload, widths: int) -> int:
    """widths: the intermediate sizes of all layers, added up."""
    return 2 * work.tokens * (3 if work.shape.gated_mlp else 2) * work.shape.hidden_size * widths

"""What operators that only pass over their tensors read and write, and how many kernels a micro-batch launches."""

from __future__ import annotations

from mst_ds.planner.workload import Workload, of_all_kinds

# Bytes of an element in 16 bits: by torch's operators one after another, and by one kernel each way.
_NORM_FORWARD, _NORM_BACKWARD = (40, 4), (78, 8)
_ROTARY = (14, 4)  # one way
_ACTIVATION = (38, 18)  # of an MLP, both ways, its forward twice
_LOGIT = (44, 6)  # both ways
_ADDED = 12  # to the residual, both ways
# Kernels, as counted on fake tensors of a GPU: of a layer's forward and backward, of its forward again, and of each
# chunk in it.
_LAYER_KERNELS, _AGAIN_KERNELS, _CHUNK_KERNELS, _LOSS_KERNELS = 64, 16, 24, 16


def passed_bytes(work: Workload, *, fused: bool) -> int:
    """Of a micro-batch of this rank.

    Args:
        fused: whether norms, rotary embedding, the MLP's activation and the loss are one kernel each, as they are in 16
            bits on a GPU.
    """
    of_token = _passed_in_layers(work, fused=fused) + work.shape.vocab_size * _LOGIT[1 if fused else 0]
    return work.tokens * of_token * work.zero.dtype_bytes // 2


@of_all_kinds
def _passed_in_layers(work: Workload, *, fused: bool) -> int:
    """Bytes of a token in 16 bits, of all layers."""
    of_kind = 1 if fused else 0
    shape, norms = work.shape, work.shape.norms
    forwards = 2 if work.settings.recompute else 1
    normed = shape.hidden_size * (norms.pre_norms + norms.post_norms) + norms.query_key_width
    of_layer = normed * (forwards * _NORM_FORWARD[of_kind] + _NORM_BACKWARD[of_kind])
    if shape.rotary_tables:
        rotated = (shape.num_attention_heads + shape.num_key_value_heads) * shape.head_dim
        of_layer += rotated * (forwards + 1) * _ROTARY[of_kind]
    of_layer += 2 * shape.hidden_size * _ADDED
    return shape.num_hidden_layers * of_layer + _active_widths(work) * _ACTIVATION[of_kind]


def launched_kernels(work: Workload) -> int:
    """By the CPU, in a micro-batch."""
    chunks = work.layer_chunks * work.settings.mlp_chunks
    of_layer = _LAYER_KERNELS * work.layer_chunks + _CHUNK_KERNELS * chunks
    if work.settings.recompute:
        of_layer += _AGAIN_KERNELS * work.layer_chunks
    experts = work.shape.experts
    if experts is not None:
        of_layer += _CHUNK_KERNELS * experts.num_experts * work.layer_chunks
    return work.shape.num_hidden_layers * of_layer + _LOSS_KERNELS * work.settings.loss_chunks


def _active_widths(work: Workload) -> int:
    """The intermediate sizes that a token goes through, of all layers."""
    shape, experts = work.shape, work.shape.experts
    widths = shape.num_dense_layers * shape.intermediate_size
    if experts is not None:
        routed = experts.num_experts_per_tok * experts.intermediate_size
        widths += experts.num_sparse_layers * (routed + experts.shared_intermediate_size)
    return widths

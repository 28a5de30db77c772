"""Memory terms of the layer stream: what a layer holds of all its tokens while it is worked through chunk by chunk."""

from __future__ import annotations

from mst_ds.geometry import ceil_divide
from mst_ds.planner.activations import hidden_term
from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.weights import largest_layer_weight
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]

_FP32_BYTES = 4
_BLOCKS_IN_FLIGHT = 2


def stream_terms(work: Workload, *, backward: bool) -> Terms:
    """What is whole, or of all earlier tokens, beside what one chunk needs; nothing where there is one chunk.

    Forward: the output, the input where that is not among what is kept on the device, and the earlier chunks' keys and
    values. Backward: the gradients of earlier chunks' keys and values in fp32, and these keys and values themselves,
    where they were not kept. The gradient of the input is written over that of the output, which goes from layer to
    layer.
    """
    if work.layer_chunks == 1:
        return ()
    streams = work.shape.residual_streams
    if backward:
        # The last layer's gradient is put together of those of its streams, which autograd does not hand over.
        is_own = streams > 1 and not work.shape.is_first_part
        return (*carried_terms(work), *([hidden_term(work, "input_gradient", streams)] * is_own))
    terms = [hidden_term(work, "layer_output", streams)]
    if work.settings.offload_activations:
        terms.append(hidden_term(work, "layer_input", streams))
    if work.settings.offload_activations or not work.last_layer_keeps_attention:
        terms.append(_of_keys(work, "carried_keys_values", _carried_tokens(work), work.zero.dtype_bytes))
    return tuple(terms)


def carried_terms(work: Workload, *, but_a_chunk: bool = False) -> Terms:
    """Of earlier keys and values the gradients, and themselves where they were not kept.

    but_a_chunk: without the gradients of the chunk that is read last, which come after its kernel.
    """
    tokens = _seen_tokens(work) - but_a_chunk * work.of_chunk.attention_tokens
    gradients = _of_keys(work, "key_value_gradients", tokens, max(_FP32_BYTES, work.zero.dtype_bytes))
    return (*([gradients] if gradients.bytes else []), *carried_keys(work))


def carried_keys(work: Workload) -> Terms:
    """Earlier keys and values in the backward, where they were not kept."""
    if work.last_layer_keeps_attention:
        return ()
    return (_of_keys(work, "carried_keys_values", _seen_tokens(work), work.zero.dtype_bytes),)


def parameter_sums(work: Workload, *, but: int = 0) -> Terms:
    """The sums of a layer's parameter gradients, in fp32, without those of so many parameters, which have none yet in
    the backward of the last chunk; all have one from the next chunk's on."""
    count = work.shape.trained.layer - (but if work.shape.is_trained_whole else 0)
    if count <= 0:
        return ()
    return (product_term("layer_weight_gradients", "device", ("trained weights", count), ("bytes", _FP32_BYTES)),)


def end_of_backward(work: Workload) -> Terms:
    """The sums are rounded, one after another."""
    terms = parameter_sums(work)
    if work.zero.dtype_bytes == _FP32_BYTES or not work.shape.is_trained_whole:
        return terms
    largest = ("largest weight", largest_layer_weight(work.shape)), ("bytes", work.zero.dtype_bytes)
    return (*terms, product_term("rounded_weight_gradients", "device", *largest))


def blocks_in_flight(work: Workload) -> Terms:
    """Earlier chunks' keys and values that a chunk reads from the host in its backward: the one that it reads, and the
    one on its way."""
    if not work.settings.offload_activations or not work.last_layer_keeps_attention or work.layer_chunks == 1:
        return ()
    blocks = min(_BLOCKS_IN_FLIGHT, work.layer_chunks - 1)
    tokens = blocks * work.of_chunk.attention_tokens
    return (_of_keys(work, "kept_keys_values_in_flight", tokens, work.zero.dtype_bytes),)


def _of_keys(work: Workload, name: str, tokens: int, element_bytes: int) -> MemoryTerm:
    return product_term(
        name,
        "device",
        ("tokens of all shards", tokens),
        ("width of keys and values", work.key_value_width),
        ("bytes", element_bytes),
    )


def _seen_tokens(work: Workload) -> int:
    """Earlier tokens that a chunk of the last layer sees, in whole chunks."""
    if not work.last_layer_has_attention:
        return 0  # a state is no longer than a few tokens
    if not work.last_layer_has_window:
        return work.earlier_tokens
    of_chunk = work.of_chunk.attention_tokens
    window = work.zero.micro_batch_size * (work.shape.sliding_windows[0] - 1)
    return min(work.earlier_tokens, ceil_divide(window, of_chunk) * of_chunk)


def _carried_tokens(work: Workload) -> int:
    """Those that are there in the forward: with a window beside the seen ones the chunk's own."""
    if not work.last_layer_has_attention:
        return 0
    if not work.last_layer_has_window:
        return work.earlier_tokens
    return min(work.earlier_tokens, _seen_tokens(work) + work.of_chunk.attention_tokens)

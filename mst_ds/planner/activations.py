"""Memory terms of the activations: attention, norms, the chunked MLP, the chunked loss, and what is kept.

The functions named `*_step` return what one operator needs while it runs. Operators run one after another, so
only the largest of them counts in a phase.
"""

from __future__ import annotations

from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]

_FP32_BYTES = 4
# A norm keeps 8 bytes an element for its backward, in every dtype: in fp32 the normalised input and the
# output, in 16 bits also the fp32 copy of the input.
_NORM_KEPT_BYTES = 8
_NORMS_IN_LAYER = 2


def kept_between_layers(work: Workload) -> Terms:
    """What the forward leaves for the backward: layer inputs, or without recompute all that layers save."""
    layers = work.shape.num_hidden_layers
    if work.recompute:
        return (_hidden_term(work, "layer_inputs", layers),)
    return tuple(
        MemoryTerm(term.name, layers * term.bytes, term.place, f"layers {layers} x {term.formula}")
        for term in layer_activations(work)
    )


def layer_activations(work: Workload) -> Terms:
    """What a layer saves for its backward. The chunked MLP saves only its input, the norm's output."""
    width = work.query_width + 2 * work.key_value_width
    return (
        product_term(
            "norm_activations",
            "device",
            ("norms", _NORMS_IN_LAYER),
            ("tokens", work.tokens),
            ("hidden_size", work.shape.hidden_size),
            ("bytes", _NORM_KEPT_BYTES),
        ),
        _attention_term(work, "query_key_value", 1, width),
        *_repeated_key_value(work),
        # As attention returns it, and as the output projection reads it.
        _attention_term(work, "attention_output", 2, work.query_width),
        _hidden_term(work, "residual", 1),
    )


def attention_step(work: Workload, *, backward: bool) -> Terms:
    """Attention with its all-to-alls. In the backward the layer's activations count apart from this."""
    terms = _all_to_all_buffers(work)
    if backward:
        width = work.query_width if work.repeats_key_value else work.key_value_width
        return (*terms, _attention_term(work, "attention_gradients", 2, work.query_width + width))
    if not work.recompute:
        return terms
    kept = [term for term in layer_activations(work) if term.name != "norm_activations"]
    return (*terms, *kept, _hidden_term(work, "attention_input", 1))


def norm_step(work: Workload, *, backward: bool) -> Terms:
    """Hugging Face's RMSNorm works on fp32 tensors, two at a time, in either direction."""
    name = "norm_gradients" if backward else "norm_working_set"
    return (
        product_term(
            name,
            "device",
            ("tensors", 2),
            ("tokens", work.tokens),
            ("hidden_size", work.shape.hidden_size),
            ("bytes", _FP32_BYTES),
        ),
    )


def mlp_chunk(work: Workload, chunks: int, *, backward: bool) -> MemoryTerm:
    """The part of the MLP that chunks make smaller.

    Forward: gate and up, the product written over the gate. Backward: gate, up, the product, two gradients.
    """
    return product_term(
        "mlp_chunk",
        "device",
        ("tensors", 5 if backward else 2),
        ("chunk tokens", work.chunk_tokens(chunks)),
        ("intermediate_size", work.shape.intermediate_size),
        ("bytes", work.zero.dtype_bytes),
    )


def mlp_unchunked(work: Workload, *, backward: bool) -> Terms:
    """The part of the MLP that has the same size at any number of chunks."""
    if not backward:
        # Without recompute the residual and the MLP's input are counted among the kept activations.
        held = (_hidden_term(work, "residual", 1), _hidden_term(work, "mlp_input", 1)) if work.recompute else ()
        return (*held, _hidden_term(work, "mlp_output", 1))
    return (
        _hidden_term(work, "mlp_input_gradient", 1),
        product_term(
            "mlp_weight_gradients",
            "device",
            ("matrices", 3),
            ("hidden_size", work.shape.hidden_size),
            ("intermediate_size", work.shape.intermediate_size),
            ("bytes", _FP32_BYTES),
        ),
    )


def output_gradient(work: Workload) -> Terms:
    """The gradient of the layer's output, which the backward carries from layer to layer."""
    return (_hidden_term(work, "output_gradient", 1),)


def loss_logits(work: Workload, chunks: int) -> Terms:
    """A chunk's logits in fp32, overwritten by their gradient, and in the model's dtype if it is another."""
    factors = (("chunk tokens", work.chunk_tokens(chunks)), ("vocab_size", work.shape.vocab_size))
    logits = product_term("loss_logits", "device", *factors, ("bytes", _FP32_BYTES))
    if work.zero.dtype_bytes == _FP32_BYTES:
        return (logits,)
    return (logits, product_term("loss_logits_16bit", "device", *factors, ("bytes", work.zero.dtype_bytes)))


def loss_scaling(work: Workload) -> Terms:
    """What the loss returns in its backward: its two gradients, scaled, in the model's dtype."""
    size = work.zero.dtype_bytes
    factors = (
        ("vocab_size", work.shape.vocab_size),
        ("hidden_size", work.shape.hidden_size),
        ("bytes", size),
    )
    return (
        _hidden_term(work, "scaled_hidden_gradient", 1),
        product_term("scaled_head_gradient", "device", *factors),
    )


def loss_unchunked(work: Workload) -> Terms:
    """The final norm, and the two gradients that the loss computes in the forward and keeps."""
    hidden_size = work.shape.hidden_size
    return (
        product_term(
            "final_norm_activations",
            "device",
            ("tokens", work.tokens),
            ("hidden_size", hidden_size),
            ("bytes", _NORM_KEPT_BYTES),
        ),
        _hidden_term(work, "hidden_gradient", 1),
        product_term(
            "head_gradient",
            "device",
            ("vocab_size", work.shape.vocab_size),
            ("hidden_size", hidden_size),
            ("bytes", _FP32_BYTES),
        ),
    )


def _all_to_all_buffers(work: Workload) -> Terms:
    """Queries, keys and values travel in one exchange, through a flat buffer at either end."""
    if work.sp_size == 1:
        return ()
    return (_attention_term(work, "all_to_all_buffers", 2, work.query_width + 2 * work.key_value_width),)


def _repeated_key_value(work: Workload) -> Terms:
    if not work.repeats_key_value:
        return ()
    return (_attention_term(work, "repeated_key_value", 2, work.query_width),)


def _hidden_term(work: Workload, name: str, tensors: int) -> MemoryTerm:
    return product_term(
        name,
        "device",
        ("tensors", tensors),
        ("tokens", work.tokens),
        ("hidden_size", work.shape.hidden_size),
        ("bytes", work.zero.dtype_bytes),
    )


def _attention_term(work: Workload, name: str, tensors: int, width: int) -> MemoryTerm:
    return product_term(
        name,
        "device",
        ("tensors", tensors),
        ("tokens of all shards", work.attention_tokens),
        ("width of this rank's heads", width),
        ("bytes", work.zero.dtype_bytes),
    )

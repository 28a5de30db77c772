"""Memory terms of the activations: attention, norms, the chunked loss, and what is kept.

The functions named `*_step` return what one operator needs while it runs. Operators run one after another, so
only the largest of them counts in a phase.
"""

from __future__ import annotations

from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]

_FP32_BYTES = 4


def hidden_term(work: Workload, name: str, tensors: int) -> MemoryTerm:
    """So many tensors of a token's hidden states, in the model's dtype."""
    return product_term(
        name,
        "device",
        ("tensors", tensors),
        ("tokens", work.tokens),
        ("hidden_size", work.shape.hidden_size),
        ("bytes", work.zero.dtype_bytes),
    )


def kept_between_layers(work: Workload) -> Terms:
    """What the forward leaves for the backward: layer inputs, or without recompute all that layers save."""
    layers = work.shape.num_hidden_layers
    if work.recompute:
        return (hidden_term(work, "layer_inputs", layers), *_router_logits(work))
    kept = tuple(
        MemoryTerm(term.name, layers * term.bytes, term.place, f"layers {layers} x {term.formula}")
        for term in layer_activations(work)
    )
    # torch's LayerNorm keeps its input, in fp32 transformers' too: of the layer's first norm that is the layer's.
    keeps_input = work.shape.norms.kind == "layer" or work.zero.dtype_bytes == _FP32_BYTES
    inputs = (hidden_term(work, "layer_inputs", layers),) if keeps_input else ()
    return (*inputs, *kept, *_router_logits(work))


def layer_activations(work: Workload) -> Terms:
    """What a layer saves for its backward. The chunked MLP saves only its input, the norm's output."""
    width = work.query_width + 2 * work.key_value_width
    return (
        *_norm_activations(work),
        _attention_term(work, "query_key_value", 1, width),
        *_fused_query_key(work),
        *_repeated_key_value(work),
        # As attention returns it, and as the output projection reads it.
        _attention_term(work, "attention_output", 2, work.query_width),
        hidden_term(work, "residual", 1),
    )


def attention_step(work: Workload, *, backward: bool) -> Terms:
    """Attention with its all-to-alls. In the backward the layer's activations count apart from this."""
    terms = (*_all_to_all_buffers(work), *_attention_scores(work, backward=backward))
    if backward:
        width = work.query_width if work.repeats_key_value else work.key_value_width
        return (*terms, _attention_term(work, "attention_gradients", 2, work.query_width + width))
    if not work.recompute:
        return terms
    kept = [term for term in layer_activations(work) if term not in _norm_activations(work)]
    return (*terms, *kept, hidden_term(work, "attention_input", 1))


def norm_step(work: Workload, *, backward: bool) -> Terms:
    """transformers' norms work on fp32 tensors; torch's LayerNorm makes one tensor in the model's dtype."""
    norms = work.shape.norms
    held = () if backward else (hidden_term(work, "norm_input", 1),)
    name = "norm_gradients" if backward else "norm_working_set"
    if norms.kind == "layer":
        return (*held, hidden_term(work, name, 1))
    tensors = 2
    if work.zero.dtype_bytes < _FP32_BYTES:
        # Copies from and to 16 bits. A norm at the layer's end is differentiated before anything kept is freed.
        tensors = 4 if backward and norms.post_norms else 3
    factors = (("tokens", work.tokens), ("hidden_size", work.shape.hidden_size), ("bytes", _FP32_BYTES))
    return (*held, product_term(name, "device", ("tensors", tensors), *factors))


def output_gradient(work: Workload) -> Terms:
    """The gradient of the layer's output, which the backward carries from layer to layer."""
    return (hidden_term(work, "output_gradient", 1),)


def loss_logits(work: Workload, chunks: int) -> Terms:
    """A chunk's logits in fp32, overwritten by their gradient, and in the model's dtype if it is another.

    A softcap's derivative is as large again.
    """
    factors = (("chunk tokens", work.chunk_tokens(chunks)), ("vocab_size", work.shape.vocab_size))
    terms = [product_term("loss_logits", "device", *factors, ("bytes", _FP32_BYTES))]
    if work.zero.dtype_bytes != _FP32_BYTES:
        terms.append(product_term("loss_logits_16bit", "device", *factors, ("bytes", work.zero.dtype_bytes)))
    if work.shape.has_logit_softcap:
        terms.append(product_term("loss_softcap_derivative", "device", *factors, ("bytes", _FP32_BYTES)))
    return tuple(terms)


def loss_scaling(work: Workload) -> Terms:
    """What the loss returns in its backward: its two gradients, scaled, in the model's dtype."""
    size = work.zero.dtype_bytes
    factors = (
        ("vocab_size", work.shape.vocab_size),
        ("hidden_size", work.shape.hidden_size),
        ("bytes", size),
    )
    return (
        hidden_term(work, "scaled_hidden_gradient", 1),
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
            ("bytes", _bytes_kept_by_norm(work, is_read=True)),
        ),
        hidden_term(work, "hidden_gradient", 1),
        product_term(
            "head_gradient",
            "device",
            ("vocab_size", work.shape.vocab_size),
            ("hidden_size", hidden_size),
            ("bytes", _FP32_BYTES),
        ),
    )


def _norm_activations(work: Workload) -> Terms:
    norms, hidden = work.shape.norms, work.shape.hidden_size
    read, added = _bytes_kept_by_norm(work, is_read=True), _bytes_kept_by_norm(work, is_read=False)
    kinds = (
        ("norm_activations", norms.pre_norms, hidden, read),
        ("post_norm_activations", norms.post_norms, hidden, added),
        ("query_key_norm_activations", 1, norms.query_key_width, added),
    )
    return tuple(
        product_term(name, "device", ("norms", count), ("tokens", work.tokens), ("width", width), ("bytes", size))
        for name, count, width, size in kinds
        if count * width
    )


def _bytes_kept_by_norm(work: Workload, *, is_read: bool) -> int:
    """What a norm keeps of each element for its backward.

    Args:
        is_read: a projection reads its output, and so keeps it; its input is the residual, which is kept anyway.
    """
    size, kind = work.zero.dtype_bytes, work.shape.norms.kind
    if kind == "layer":
        return size  # the output, or else the input
    normalised = size if kind == "rms" else _FP32_BYTES
    centered = 2 * _FP32_BYTES if kind == "layer_fp32" else 0
    needs_input = size < _FP32_BYTES or not is_read  # 16 bits: its copy in fp32
    return needs_input * _FP32_BYTES + centered + normalised + is_read * size


def _router_logits(work: Workload) -> Terms:
    """The load-balancing loss is computed after the last layer, from the logits of all routers and their softmax."""
    experts = work.shape.experts
    if experts is None or not work.shape.has_router_loss:
        return ()
    return (
        product_term(
            "router_logits",
            "device",
            ("layers", experts.num_sparse_layers),
            ("tensors", 2),
            ("tokens", work.tokens),
            ("num_experts", experts.num_experts),
            ("bytes", work.zero.dtype_bytes),
        ),
    )


def _all_to_all_buffers(work: Workload) -> Terms:
    """Queries, keys and values travel in one exchange, through a flat buffer at either end."""
    if work.sp_size == 1:
        return ()
    return (_attention_term(work, "all_to_all_buffers", 2, work.query_width + 2 * work.key_value_width),)


def _fused_query_key(work: Workload) -> Terms:
    """Values are a view of the fused projection's output, and keep all of it; an all-to-all copies them."""
    if not work.shape.has_fused_qkv or work.sp_size > 1:
        return ()
    return (_attention_term(work, "fused_query_key", 1, work.query_width + work.key_value_width),)


def _attention_scores(work: Workload, *, backward: bool) -> Terms:
    """No kernel of torch has a softcap: attention is computed in plain torch, by blocks of queries."""
    if not work.shape.has_attention_softcap or work.attention != "sdpa":
        return ()
    return (
        product_term(
            "attention_scores",
            "device",
            ("tensors", 4 if backward else 3),
            ("sequences", work.zero.micro_batch_size),
            ("query heads of this rank", work.query_heads),
            ("scores of a block", work.block_scores),
            ("bytes", _FP32_BYTES),
        ),
    )


def _repeated_key_value(work: Workload) -> Terms:
    if not work.repeats_key_value:
        return ()
    return (_attention_term(work, "repeated_key_value", 2, work.query_width),)


def _attention_term(work: Workload, name: str, tensors: int, width: int) -> MemoryTerm:
    return product_term(
        name,
        "device",
        ("tensors", tensors),
        ("tokens of all shards", work.attention_tokens),
        ("width of this rank's heads", width),
        ("bytes", work.zero.dtype_bytes),
    )

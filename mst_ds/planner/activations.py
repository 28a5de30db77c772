"""Memory terms of the activations: what layers save, attention, norms, and the chunked loss.

The functions named `*_step` return what one operator needs while it runs. Operators run one after another, so
only the largest of them counts in a phase.
"""

from __future__ import annotations

from mst_ds.geometry import ELEMENTS_THAT_KEEP_BUSY, ceil_divide
from mst_ds.planner.attention import (
    earlier_keys_step,
    gathered_step,
    local_gradients,
    local_term,
    log_sum_exp,
    output_width,
    query_key_value_width,
    saved_width,
    window_step,
)
from mst_ds.planner.kept import Moment, kept_by_recompute
from mst_ds.planner.mixers import mixer_step, saved_by_mixers
from mst_ds.planner.picks import picks_handed_on, picks_of_layers, scores_step
from mst_ds.planner.streams import made_of_streams, saved_of_streams
from mst_ds.planner.types import MemoryTerm, product_term, total_bytes
from mst_ds.planner.windows import window_mask
from mst_ds.planner.workload import Workload, remembered_computing

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


def kept_between_layers(work: Workload, phase: Moment) -> Terms:
    """What layers leave for their backward and is kept for all of them until then: with recompute no activations but
    the layers' inputs, and attention's output where that is kept."""
    every_setting = (*_rotary_tables(work), *_router_logits(work), *window_mask(work), *_of_all_layers(work, phase))
    if work.settings.recompute:
        return (*kept_by_recompute(work, phase), *picks_handed_on(work), *every_setting)
    return (hidden_term(work, "layer_inputs", work.shape.num_hidden_layers), *every_setting)


def _of_all_layers(work: Workload, phase: Moment) -> Terms:
    """What layers share: their embeddings, with what the norm of these saved, and the keys and values that some hand on
    to others; in the backward the gradients of all, once the last layer has given its own."""
    shape = work.shape
    widths = (("layer_embeddings", shape.layer_embeddings_width), ("handed_on_keys_values", shape.handed_on_width))
    terms = list(made_of_streams(work, phase))
    terms += [
        local_term(work, name, width * (2 if name == "layer_embeddings" else 1)) for name, width in widths if width
    ]
    if phase == "backward" and shape.is_first_part:
        terms += [local_term(work, f"{name}_gradient", width) for name, width in widths if width]
    return tuple(terms)


def layer_activations(work: Workload, *, of_attention: bool = True, after_attention: bool = True) -> Terms:
    """What layers save for their backward beside what `kept_between_layers` has.

    With recompute it is the last layer that saves this, when it is computed again; without it all layers do.

    Args:
        of_attention: whether the last layer still has what its attention saved, and the operators before that.
        after_attention: whether it still has what its operators after the attention saved.
    """
    if work.settings.recompute:
        return _saved_by_layers(work, int(of_attention), int(after_attention))
    *others, last = work.kinds  # of which the last layer is one
    saved: Terms = ()
    for kind in others:
        saved += _saved_by_layers(kind, kind.shape.num_hidden_layers, kind.shape.num_hidden_layers)
    earlier = last.shape.num_hidden_layers - 1
    return saved + _saved_by_layers(last, earlier + of_attention, earlier + after_attention)


def _saved_by_layers(work: Workload, first: int, last: int) -> Terms:
    """By layers that are alike: of so many what attention and the operators before it saved, and what those after it
    did."""
    norms, attentions = work.shape.norms, first * work.last_layer_has_attention
    terms = [
        _hidden_of_layers(work, "attention_input", first, min(1, norms.pre_norms)),
        local_term(work, "query_key_value", saved_width(work.shape), attentions),
        *_fused_query_key(work, attentions),
        local_term(work, "query_key_norm_inputs", norms.query_key_width, attentions),
        *_value_norm_inputs(work, attentions),
        *saved_by_mixers(work, first),
        *_layer_embedding(work, last),
        *saved_of_streams(work, last),
        _hidden_of_layers(work, "post_norm_inputs", last, norms.post_norms),
        # A layer whose MLP stands beside its attention has no residual between them, and one norm for both.
        _hidden_of_layers(work, "residual", last, int(norms.pre_norms != 1)),
        _hidden_of_layers(work, "mlp_input", last, int(norms.pre_norms > 1)),
        # A gate weighs it.
        _hidden_of_layers(work, "shared_expert_output", last, int(_has_shared_expert(work))),
    ]
    if width := work.shape.trained.dropout_width:
        # Its output, and a byte of its mask.
        of_element = ("bytes with the mask's", work.zero.dtype_bytes + 1)
        factors = (("layers", first), ("tokens", work.tokens), ("width", width), of_element)
        terms.append(product_term("adapter_dropout", "device", *factors))
    if not work.last_layer_keeps_attention:
        terms.append(local_term(work, "attention_output", output_width(work.shape), attentions))
        terms.append(log_sum_exp(work, attentions))
        terms.extend(picks_of_layers(work, first))
    return tuple(term for term in terms if term.bytes)


def _value_norm_inputs(work: Workload, layers: int) -> Terms:
    """Of a norm without weights, which autograd differentiates, in fp32."""
    width = ("width of all heads", work.shape.norms.value_width)
    factors = (("layers", layers), ("tokens", work.tokens), width, ("bytes", _FP32_BYTES))
    return (product_term("value_norm_inputs", "device", *factors),)


def _layer_embedding(work: Workload, layers: int) -> Terms:
    """Of what adds a layer's embedding after its MLP: its input, its norm's, and its gate before and after."""
    if not work.shape.layer_embedding_width:
        return ()
    if work.settings.recompute and work.shape.residual_streams == 1:
        # Its own backward is over before there is more; its input is what the MLP's result was added to.
        return (_hidden_of_layers(work, "embedding_residual", layers, 1),)
    gates = local_term(work, "embedding_gates", 3 * work.shape.layer_embedding_width, layers)
    return (_hidden_of_layers(work, "embedding_residual", layers, 2), gates)


def mixing_step(work: Workload, *, backward: bool, earlier: Terms | None = None) -> Terms:
    """The largest of what lets the last layer's tokens meet: attention, see `attention_step`, or a mixer."""
    steps = [attention_step(work, backward=backward, earlier=earlier)] if work.last_layer_has_attention else []
    mixer = mixer_step(work, backward=backward)
    if mixer and work.settings.recompute and not backward:
        mixer += (hidden_term(work, "attention_input", 1), hidden_term(work, "attention_result", 1))
    return max(*steps, mixer, key=total_bytes) if steps else mixer


def attention_step(work: Workload, *, backward: bool, earlier: Terms | None = None) -> Terms:
    """Attention with its all-to-alls. In the backward the layer's activations count apart from this.

    Args:
        work: of a layer, or of one chunk.
        earlier: what a chunk needs beside itself to read earlier chunks' keys; None where there are none.
    """
    moments = [gathered_step(work, backward=backward), scores_step(work)]
    if earlier is not None:
        moments.append((*earlier_keys_step(work, backward=backward), *earlier))
    if backward:
        return (*max(*moments, window_step(work), key=total_bytes), *local_gradients(work))
    # The output projection comes after it, while all that attention was given is still there.
    largest = max(*moments, (hidden_term(work, "attention_result", 1),), key=total_bytes)
    largest = (*largest, *_split_query_key(work))
    if not work.settings.recompute:
        return largest
    # What is kept is among the kept.
    return (
        *largest,
        *(() if work.last_layer_keeps_attention else (local_term(work, "attention_output", output_width(work.shape)),)),
        hidden_term(work, "attention_input", 1),
        local_term(work, "query_key_value", query_key_value_width(work.shape)),
        *_fused_query_key(work, 1),
    )


def norm_step(work: Workload, *, backward: bool) -> Terms:
    """Norms work on fp32 tensors, of a chunk at a time; torch's LayerNorm makes one tensor in the model's dtype."""
    norms, elements = work.shape.norms, work.tokens * work.shape.hidden_size
    if backward:
        held = hidden_term(work, "norm_gradient", 1)
    else:
        # Without recompute it is the model's final norm, whose input no layer has saved.
        held = hidden_term(work, "norm_output", 1 if work.settings.recompute else 2)
    if norms.kind == "layer":
        return (held,)
    if norms.kind == "layer_fp32":
        tensors = 7 if backward else 4  # differentiated by autograd
    elif work.zero.dtype_bytes < _FP32_BYTES:
        # In fp32 too: what is given. In the forward the two tensors that return to 16 bits are one of fp32.
        tensors = 4 if backward else 3
    else:
        tensors = 2
    # All chunks are equally long; on the CPU the norms take shorter ones.
    chunk = ceil_divide(elements, ceil_divide(elements, ELEMENTS_THAT_KEEP_BUSY))
    factors = (("tensors", tensors), ("elements of a chunk", chunk))
    return (held, product_term("norm_working_set", "device", *factors, ("bytes", _FP32_BYTES)))


def output_gradient(work: Workload) -> Terms:
    """The gradient of the layer's output, which the backward carries from layer to layer."""
    return (hidden_term(work, "output_gradient", work.shape.residual_streams),)


def loss_logits(work: Workload, chunks: int) -> Terms:
    """A chunk's logits in fp32, overwritten by their gradient, and in the model's dtype if it is another.

    A softcap's derivative is as large again.
    """
    factors = (("chunk tokens", work.chunk_tokens(chunks)), ("vocab_size", work.shape.vocab_size))
    terms = [product_term("loss_logits", "device", *factors, ("bytes", _FP32_BYTES))]
    if work.zero.dtype_bytes != _FP32_BYTES:
        terms.append(product_term("loss_logits_16bit", "device", *factors, ("bytes", work.zero.dtype_bytes)))
        if work.shape.trained.head:
            # The head's gradient is a product of fp32 tensors.
            of_chunk = factors[0], ("hidden_size", work.shape.hidden_size), ("bytes", _FP32_BYTES)
            terms.append(product_term("loss_hidden_states", "device", *of_chunk))
    if work.shape.has_logit_softcap:
        terms.append(product_term("loss_softcap_derivative", "device", *factors, ("bytes", _FP32_BYTES)))
    return tuple(terms)


@remembered_computing
def loss_scaling(work: Workload) -> Terms:
    """What the loss returns in its backward: its two gradients, scaled, in the model's dtype."""
    return (
        hidden_term(work, "scaled_hidden_gradient", 1),
        *_head_gradient(work, "scaled_head_gradient", work.zero.dtype_bytes),
    )


@remembered_computing
def loss_unchunked(work: Workload) -> Terms:
    """The final norm's input, and the two gradients that the loss computes in the forward and keeps."""
    return (
        hidden_term(work, "final_norm_input", 1),
        hidden_term(work, "hidden_gradient", 1),
        *_head_gradient(work, "head_gradient", _FP32_BYTES),
    )


def _head_gradient(work: Workload, name: str, element_bytes: int) -> Terms:
    """Of the head's weight where it is trained, or of adapters on it."""
    shape, count = work.shape, work.shape.trained.head
    if not count:
        return ()
    is_whole = count == shape.head_weight_count
    sizes = (("vocab_size", shape.vocab_size), ("hidden_size", shape.hidden_size))
    factors = sizes if is_whole else (("trained parameters of the head", count),)
    return (product_term(name, "device", *factors, ("bytes", element_bytes)),)


def _hidden_of_layers(work: Workload, name: str, layers: int, tensors: int) -> MemoryTerm:
    factors = (("tokens", work.tokens), ("hidden_size", work.shape.hidden_size), ("bytes", work.zero.dtype_bytes))
    return product_term(name, "device", ("layers", layers), ("tensors", tensors), *factors)


def _rotary_tables(work: Workload) -> Terms:
    """Cosines and sines, which all layers of a kind share."""
    if work.shape.position_parameter_count:
        return ()
    # Kinds of layers that differ have tables of their own.
    widths = {kind.shape.head_dim for kind in work.kinds}
    tables = work.shape.rotary_tables - len(widths) + 1
    return (local_term(work, "rotary_tables", 2 * (sum(widths) + (tables - 1) * max(widths))),)


def _has_shared_expert(work: Workload) -> bool:
    return work.shape.experts is not None and work.shape.experts.shared_intermediate_size > 0


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


def _split_query_key(work: Workload) -> Terms:
    """Beside the projections' outputs, of which attention's forward has parts: what is rotated, and the whole."""
    if not work.shape.split_rotary_width:
        return ()
    heads = work.shape.num_attention_heads + work.shape.num_key_value_heads
    return (local_term(work, "split_query_key", heads * (work.shape.head_dim + work.shape.split_rotary_width)),)


def _fused_query_key(work: Workload, layers: int) -> Terms:
    """Values are a view of the fused projection's output, and keep all of it."""
    if not work.shape.has_fused_qkv:
        return ()
    heads = work.shape.num_attention_heads + work.shape.num_key_value_heads
    return (local_term(work, "fused_query_key", heads * work.shape.head_dim, layers),)

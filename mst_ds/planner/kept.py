"""Memory terms of what layers keep from their forward for their backward, on the device or on the host."""

from __future__ import annotations

from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]

_FP32_BYTES = 4
# The layer that is worked on, and the one whose tensors are being copied.
LAYERS_IN_FLIGHT = 2


def kept_by_recompute(work: Workload) -> Terms:
    """Each layer's input, and the output and log-sum-exp of attention where these are kept.

    On the host a tensor has a block of its own; on the device those of two layers are in flight then.
    """
    layers, attention_layers = work.shape.num_hidden_layers, work.attention_keeping_layers
    factors = _factors(work)
    kept = [("layer_inputs", layers, factors["layer_inputs"])]
    if attention_layers:
        kept += [(name, attention_layers, factors[name]) for name in ("kept_attention", "kept_log_sum_exp")]
    if not work.offload_activations:
        return tuple(product_term(name, "device", ("layers", count), *sizes) for name, count, sizes in kept)
    in_flight = (
        product_term(f"{name}_in_flight", "device", ("layers", min(LAYERS_IN_FLIGHT, count)), *sizes)
        for name, count, sizes in kept
    )
    return (*in_flight, *kept_on_host(work))


def kept_gate_up(work: Workload, *, of_last_layer: bool = True) -> Terms:
    """Gate and up of the layers' MLPs, of an MLP without a gate what stands before its activation; with experts that of
    the MLP beside them.

    of_last_layer: whether the last layer still has its own. Where some layers have experts the last is one of these.
    """
    if not work.keep_mlp:
        return ()
    shape, experts = work.shape, work.shape.experts
    layers = {"kept_gate_up": (shape.num_dense_layers, shape.intermediate_size)}
    if experts is not None:
        layers["kept_gate_up_beside_experts"] = experts.num_sparse_layers, experts.shared_intermediate_size
    last = list(layers)[-1]
    terms = (
        product_term(
            name,
            "device",
            ("layers", count if of_last_layer or name != last else count - 1),
            ("tensors", 2 if shape.gated_mlp else 1),
            ("tokens", work.tokens),
            ("intermediate_size", width),
            ("bytes", work.zero.dtype_bytes),
        )
        for name, (count, width) in layers.items()
    )
    return tuple(term for term in terms if term.bytes)


def kept_on_host(work: Workload) -> Terms:
    """The blocks of pinned memory, which torch's allocator of it rounds up to a power of two, and never gives back."""
    if not (work.recompute and work.offload_activations):
        return ()
    counts = {"layer_inputs": work.shape.num_hidden_layers}
    if work.attention_keeping_layers:
        counts |= {"kept_attention": work.attention_keeping_layers, "kept_log_sum_exp": work.attention_keeping_layers}
    factors = _factors(work)
    return tuple(
        product_term(
            f"{name}_on_host",
            "host",
            ("layers", count),
            ("bytes, rounded up to a power of two", _power_of_two(product_term(name, "host", *factors[name]).bytes)),
        )
        for name, count in counts.items()
    )


def copied_bytes(work: Workload) -> int:
    """Bytes that go over the link to the host in a micro-batch: once there, once back."""
    if not (work.recompute and work.offload_activations):
        return 0
    on_device = [
        product_term(name, "device", *sizes).bytes
        * (work.shape.num_hidden_layers if name == "layer_inputs" else work.attention_keeping_layers)
        for name, sizes in _factors(work).items()
    ]
    return 2 * sum(on_device)


def _factors(work: Workload) -> dict[str, tuple[tuple[str, int], ...]]:
    """What each tensor of one layer is the product of."""
    shape, size = work.shape, ("bytes", work.zero.dtype_bytes)
    output_width = shape.num_attention_heads * shape.value_head_dim
    return {
        "layer_inputs": (("tokens", work.tokens), ("hidden_size", shape.hidden_size), size),
        "kept_attention": (("tokens", work.tokens), ("width of all heads", output_width), size),
        "kept_log_sum_exp": (
            ("tokens of all shards", work.attention_tokens),
            ("query heads of this rank", work.query_heads),
            ("bytes", _FP32_BYTES),
        ),
    }


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()

"""Memory terms of what layers keep from their forward for their backward, on the device or on the host."""

from __future__ import annotations

from mst_ds.geometry import host_bytes, host_slabs
from mst_ds.planner.pinned import rounding_term
from mst_ds.planner.types import MemoryTerm, product_term, total_bytes
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]
Factor = tuple[str, int]

_FP32_BYTES = 4
# The layer that is worked on, and the one whose tensors are being copied.
LAYERS_IN_FLIGHT = 2


def kept_by_recompute(work: Workload) -> Terms:
    """Each layer's input, and the output and log-sum-exp of attention where these are kept.

    Where they are on the host, those of two layers are in flight on the device.
    """
    kept = _inputs_and_attention(work)
    if not _is_on_host(work):
        return tuple(product_term(name, "device", ("layers", count), *sizes) for name, count, sizes in kept)
    in_flight = (
        product_term(f"{name}_in_flight", "device", ("layers", min(LAYERS_IN_FLIGHT, count)), *sizes)
        for name, count, sizes in kept
    )
    return (*in_flight, *kept_on_host(work))


def kept_gate_up(work: Workload, *, of_last_layer: bool = True) -> Terms:
    """Gate and up of the layers' MLPs, of an MLP without a gate what stands before its activation; with experts that of
    the MLP beside them. On the host, those of two layers, which are in flight.

    of_last_layer: whether the last layer has its own. Where some layers have experts the last is one of these.
    """
    kinds = _gate_up_layers(work)
    without = 0 if of_last_layer else 1
    if _is_on_host(work):
        # Layers of any kind follow each other somewhere: the widest stand for those that do.
        left = min(LAYERS_IN_FLIGHT, work.shape.num_hidden_layers) - without
        counts = []
        for name, count, width in sorted(kinds, key=lambda kind: -kind[2]):
            counts.append((f"{name}_in_flight", min(left, count), width))
            left -= counts[-1][1]
    else:
        counts = [(name, count - (without if name == kinds[-1][0] else 0), width) for name, count, width in kinds]
    terms = (
        product_term(
            name,
            "device",
            ("layers", count),
            ("tensors", _gate_up_tensors(work)),
            *_gate_up_factors(work, width),
        )
        for name, count, width in counts
    )
    return tuple(term for term in terms if term.bytes)


def kept_on_host(work: Workload) -> Terms:
    """The tensors, what the pieces of pinned memory are longer that they lie in, and what the slabs have more that
    these are cut from; a store has its slabs for good."""
    terms: Terms = ()
    for name, layers, tensors, sizes in _on_host(work):
        term = product_term(f"{name}_on_host", "host", ("layers", layers), ("tensors", tensors), *sizes)
        taken = layers * tensors * host_bytes(product_term(name, "host", *sizes).bytes)
        terms += (term, *rounding_term(term.name, taken - term.bytes))
    in_pieces = total_bytes(terms)
    return (*terms, *rounding_term("slabs_on_host", host_slabs(in_pieces) - in_pieces))


def copied_bytes(work: Workload) -> int:
    """Bytes that go over the link to the host in a micro-batch: once there, once back."""
    kept = (
        layers * tensors * product_term(name, "host", *sizes).bytes for name, layers, tensors, sizes in _on_host(work)
    )
    return 2 * sum(kept)


def _is_on_host(work: Workload) -> bool:
    return work.settings.recompute and work.settings.offload_activations


def _on_host(work: Workload) -> list[tuple[str, int, int, tuple[Factor, ...]]]:
    """Name, layers that keep it, tensors of a layer, and what each tensor is the product of."""
    if not _is_on_host(work):
        return []
    kept = [(name, layers, 1, sizes) for name, layers, sizes in _inputs_and_attention(work)]
    tensors = _gate_up_tensors(work)
    kinds = [kind for kind in _gate_up_layers(work) if kind[2]]
    return [*kept, *((name, count, tensors, _gate_up_factors(work, width)) for name, count, width in kinds)]


def _gate_up_layers(work: Workload) -> list[tuple[str, int, int]]:
    """Name, layers and width of each kind of MLP that keeps gate and up, in the order in which layers have them."""
    shape, experts = work.shape, work.shape.experts
    if not work.settings.keep_mlp:
        return []
    kinds = [("kept_gate_up", shape.num_dense_layers, shape.intermediate_size)]
    if experts is not None:
        kinds.append(("kept_gate_up_beside_experts", experts.num_sparse_layers, experts.shared_intermediate_size))
    return [kind for kind in kinds if kind[1]]


def _gate_up_tensors(work: Workload) -> int:
    return 2 if work.shape.gated_mlp else 1


def _gate_up_factors(work: Workload, width: int) -> tuple[Factor, ...]:
    return ("tokens", work.tokens), ("intermediate_size", width), ("bytes", work.zero.dtype_bytes)


def _inputs_and_attention(work: Workload) -> list[tuple[str, int, tuple[Factor, ...]]]:
    """Name, layers that keep it, and what each tensor is the product of."""
    shape, size = work.shape, ("bytes", work.zero.dtype_bytes)
    output_width = shape.num_attention_heads * shape.value_head_dim
    kept: list[tuple[str, int, tuple[Factor, ...]]] = [
        ("layer_inputs", shape.num_hidden_layers, (("tokens", work.tokens), ("hidden_size", shape.hidden_size), size))
    ]
    if layers := work.attention_keeping_layers:
        log_sum_exp = (
            ("tokens of all shards", work.attention_tokens),
            ("query heads of this rank", work.query_heads),
            ("bytes", _FP32_BYTES),
        )
        kept += [
            ("kept_attention", layers, (("tokens", work.tokens), ("width of all heads", output_width), size)),
            ("kept_log_sum_exp", layers, log_sum_exp),
        ]
    return kept

"""Memory terms of what layers keep from their forward for their backward, on the device or on the host."""

from __future__ import annotations

from typing import Literal

from mst_ds.geometry import host_bytes, host_slabs
from mst_ds.planner.picks import picks_of_tokens
from mst_ds.planner.pinned import rounding_term
from mst_ds.planner.types import MemoryTerm, product_term, total_bytes
from mst_ds.planner.workload import Workload, remembered_computing

Terms = tuple[MemoryTerm, ...]
# Of a step: while layers run, or the loss.
Moment = Literal["forward", "loss", "backward"]
Factor = tuple[str, int]
# Name, layers that keep it, and what each tensor is the product of.
Kept = tuple[str, int, tuple[Factor, ...]]

_FP32_BYTES = 4
_OUTPUT, _LOG_SUM_EXP, _KEYS_VALUES = "kept_attention", "kept_log_sum_exp", "kept_keys_values"
# The layer, or the chunk of one, that is worked on, and the one whose tensors are being copied.
PARTS_IN_FLIGHT = 2


def kept_by_recompute(work: Workload, phase: Moment) -> Terms:
    """Each layer's input, and the output and log-sum-exp of attention where these are kept; where a layer has several
    chunks, with the keys and values that later ones read.

    Where they are on the host, those of two layers, or of two chunks of one, are in flight on the device. Keys and
    values go there with their chunk; they come back when they are read.
    """
    kept = [*_inputs_and_attention(work), *_keys_values(work)]
    if not _is_on_host(work):
        terms = (product_term(name, "device", ("layers", count), *sizes) for name, count, sizes in kept)
        # One chunk of the last layer has been differentiated before its input's gradient is there.
        if phase == "backward" and work.layer_chunks > 1:
            return _last_without_a_chunk(work, _OUTPUT, tuple(terms))
        return tuple(terms)
    parts = "layers" if work.layer_chunks == 1 else "chunks"
    in_flight = [
        product_term(f"{name}_in_flight", "device", (parts, _parts_of_kept_in_flight(work, name, count)), *sizes)
        for name, count, sizes in _largest_of_each(_inputs_and_attention(work.of_chunk))
    ]
    if phase != "backward":
        # The last chunk's keys and values are not kept.
        count = min(PARTS_IN_FLIGHT, work.layer_chunks - 1) if phase == "forward" else 1
        in_flight += [
            product_term(f"{name}_in_flight", "device", ("chunks", count), *sizes)
            for name, _, sizes in _largest_of_each(_keys_of_chunk(work))
        ]
    return (*in_flight, *kept_on_host(work))


def kept_output_of_chunk(work: Workload) -> Terms:
    """Attention's, of the last layer's chunk that is differentiated first, which `kept_by_recompute` leaves out."""
    terms = (product_term(name, "device", *sizes) for name, _, sizes in _attention_of_kind(work.of_chunk))
    return tuple(term for term in terms if term.name == _OUTPUT)


def _last_without_a_chunk(work: Workload, name: str, terms: Terms) -> Terms:
    """The terms, of which the last one with this name is without a chunk: kinds of layers are in the order of their
    last."""
    places = [place for place, term in enumerate(terms) if term.name == name]
    return tuple(_without_a_chunk(work, term) if place in places[-1:] else term for place, term in enumerate(terms))


def _largest_of_each(kept: list[Kept]) -> list[Kept]:
    """One for each name, of as many layers: layers of any kind follow each other somewhere."""
    found: dict[str, Kept] = {}
    for name, layers, sizes in kept:
        _, more, others = found.get(name, (name, 0, sizes))
        largest = max(sizes, others, key=lambda each: product_term(name, "device", *each).bytes)
        found[name] = name, layers + more, largest
    return list(found.values())


def _without_a_chunk(work: Workload, term: MemoryTerm) -> MemoryTerm:
    (_, layers), (label, tokens), *rest = term.factors
    if work.layer_chunks == 1:
        return product_term(term.name, term.place, ("layers", layers - 1), (label, tokens), *rest)
    of_layers = (f"{label} of all layers, but of a chunk", layers * tokens - tokens // work.layer_chunks)
    return product_term(term.name, term.place, of_layers, *rest)


def _parts_of_kept_in_flight(work: Workload, name: str, layers: int) -> int:
    """Of layers that differ those with attention that is kept may not follow each other."""
    parts = _parts_in_flight(work, layers)
    if work.shape.layers_are_alike or work.layer_chunks > 1 or name not in (_OUTPUT, _LOG_SUM_EXP):
        return parts
    last = range(work.shape.num_hidden_layers)[-PARTS_IN_FLIGHT:]
    return min(parts, sum(layer not in work.shape.window_layers for layer in last))


def _parts_in_flight(work: Workload, layers: int) -> int:
    return min(PARTS_IN_FLIGHT, layers * work.layer_chunks)


@remembered_computing
def kept_gate_up(work: Workload, *, of_last_part: bool = True) -> Terms:
    """Gate and up of the layers' MLPs, of an MLP without a gate what stands before its activation; with experts that of
    the MLP beside them. On the host, those of two layers, or chunks, which are in flight.

    of_last_part: whether the last layer has its own, or its last chunk. Where some layers have experts the last is one
    of these.
    """
    kinds, chunks = _gate_up_layers(work), work.layer_chunks
    without = 0 if of_last_part else 1
    if not _is_on_host(work):
        terms = [_gate_up(work, name, "layers", count, width) for name, count, width in kinds]
        if without and terms:
            terms[-1] = _without_a_chunk(work, terms[-1])
        return tuple(term for term in terms if term.bytes)
    # Layers of any kind follow each other somewhere: the widest stand for those that do.
    left = _parts_in_flight(work, work.shape.num_hidden_layers) - without
    terms = []
    for name, count, width in sorted(kinds, key=lambda kind: -kind[2]):
        parts = min(left, count * chunks)
        label = "layers" if chunks == 1 else "chunks"
        terms.append(_gate_up(work.of_chunk, f"{name}_in_flight", label, parts, width))
        left -= parts
    return tuple(term for term in terms if term.bytes)


def _gate_up(work: Workload, name: str, label: str, count: int, width: int) -> MemoryTerm:
    tokens, *sizes = _gate_up_factors(work, width)
    return product_term(name, "device", (label, count), tokens, ("tensors", _gate_up_tensors(work)), *sizes)


@remembered_computing
def kept_on_host(work: Workload) -> Terms:
    """The tensors, what the pieces of pinned memory are longer that they lie in, and what the slabs have more that
    these are cut from; a store has its slabs for good."""
    terms: Terms = ()
    for name, layers, tensors, sizes in _on_host(work):
        term = product_term(f"{name}_on_host", "host", ("layers", layers), ("tensors", tensors), *sizes)
        of_tensor = product_term(name, "host", *sizes).bytes
        # Parts are nearly equal: some have one byte more.
        short, longer = divmod(of_tensor, parts := _parts(work, name))
        taken = layers * tensors * (longer * host_bytes(short + 1) + (parts - longer) * host_bytes(short))
        terms += (term, *rounding_term(term.name, taken - term.bytes))
    in_pieces = total_bytes(terms)
    return (*terms, *rounding_term("slabs_on_host", host_slabs(in_pieces) - in_pieces))


def _parts(work: Workload, name: str) -> int:
    """Of a layer's tensor: one for each chunk, and of heads between the all-to-alls for each group."""
    chunks, groups = work.layer_chunks, len(work.heads.groups)
    return {_KEYS_VALUES: 2 * (chunks - 1) * groups, _LOG_SUM_EXP: chunks * groups}.get(name, chunks)


def copied_bytes(work: Workload) -> int:
    """Bytes that go over the link to the host in a micro-batch: once there, once back; keys and values come back for
    each later chunk that reads them."""
    total = 0
    for name, layers, tensors, sizes in _on_host(work):
        reads = work.layer_chunks / 2 if name == _KEYS_VALUES else 1
        total += int((1 + reads) * layers * tensors * product_term(name, "host", *sizes).bytes)
    return total


def _is_on_host(work: Workload) -> bool:
    return work.settings.recompute and work.settings.offload_activations


def _on_host(work: Workload) -> list[tuple[str, int, int, tuple[Factor, ...]]]:
    """Name, layers that keep it, tensors of a layer, and what each tensor is the product of."""
    if not _is_on_host(work):
        return []
    kept = [(name, layers, 1, sizes) for name, layers, sizes in _inputs_and_attention(work)]
    kept += [(name, layers, 1, sizes) for name, layers, sizes in _keys_values(work)]
    tensors = _gate_up_tensors(work)
    kinds = [kind for kind in _gate_up_layers(work) if kind[2]]
    return [*kept, *((name, count, tensors, _gate_up_factors(work, width)) for name, count, width in kinds)]


def _gate_up_layers(work: Workload) -> list[tuple[str, int, int]]:
    """Name, layers and width of each kind of MLP that keeps gate and up, in the order in which layers have them."""
    shape, experts = work.shape, work.shape.experts
    if not work.settings.keep_mlp:
        return []
    kinds = [
        ("kept_gate_up", kind.num_dense_layers, kind.intermediate_size)
        for kind in shape.kinds
        if kind.layers[-1].has_plain_mlp
    ]
    if experts is not None:
        kinds.append(("kept_gate_up_beside_experts", experts.num_sparse_layers, experts.shared_intermediate_size))
    return [kind for kind in kinds if kind[1]]


def _gate_up_tensors(work: Workload) -> int:
    return 2 if work.shape.gated_mlp else 1


def _gate_up_factors(work: Workload, width: int) -> tuple[Factor, ...]:
    return ("tokens", work.tokens), ("intermediate_size", width), ("bytes", work.zero.dtype_bytes)


def _keys_values(work: Workload) -> list[Kept]:
    return _kept_keys(work, work.earlier_tokens)


def _keys_of_chunk(work: Workload) -> list[Kept]:
    return _kept_keys(work, work.of_chunk.attention_tokens)


def _kept_keys(work: Workload, tokens: int) -> list[Kept]:
    return [kept for kind in work.kinds for kept in _keys_of_kind(kind, tokens)]


def _keys_of_kind(work: Workload, tokens: int) -> list[Kept]:
    if work.layer_chunks == 1 or not work.attention_keeping_layers:
        return []
    sizes = (
        ("tokens of all shards", tokens),
        ("width of keys and values", work.key_value_width),
        ("bytes", work.zero.dtype_bytes),
    )
    return [(_KEYS_VALUES, work.attention_keeping_layers, sizes)]


@remembered_computing
def _inputs_and_attention(work: Workload) -> list[Kept]:
    shape, size = work.shape, ("bytes", work.zero.dtype_bytes)
    streams = (("hidden states of a token", shape.residual_streams),) if shape.residual_streams > 1 else ()
    sizes = (("tokens", work.tokens), *streams, ("hidden_size", shape.hidden_size), size)
    inputs: Kept = ("layer_inputs", shape.num_hidden_layers, sizes)
    return [inputs, *(kept for kind in work.kinds for kept in _attention_of_kind(kind))]


def _attention_of_kind(work: Workload) -> list[Kept]:
    """Of layers that are alike."""
    shape, size = work.shape, ("bytes", work.zero.dtype_bytes)
    output_width = shape.num_attention_heads * shape.value_head_dim
    kept: list[Kept] = []
    if layers := work.attention_keeping_layers:
        log_sum_exp = (
            ("tokens of all shards", work.attention_tokens),
            ("query heads of this rank", work.query_heads),
            ("bytes", _FP32_BYTES),
        )
        kept += [
            (_OUTPUT, layers, (("tokens", work.tokens), ("width of all heads", output_width), size)),
            (_LOG_SUM_EXP, layers, log_sum_exp),
        ]
        if shape.indexer is not None:
            kept.append(("kept_picks", min(layers, shape.indexer.num_layers), picks_of_tokens(work)))
    return kept

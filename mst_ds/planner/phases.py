"""The phases of a training step: which memory terms are alive together at each one's highest point."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from mst_ds.model_shape import LayerShape, ModelShape
from mst_ds.planner import activations, states
from mst_ds.planner.attention import held_keys_values, output_width, projected_width
from mst_ds.planner.kept import PARTS_IN_FLIGHT, kept_gate_up, kept_on_host, kept_output_of_chunk
from mst_ds.planner.mlp import MlpStep, mlp_steps
from mst_ds.planner.stream import (
    blocks_in_flight,
    carried_keys,
    carried_terms,
    end_of_backward,
    parameter_sums,
    stream_terms,
)
from mst_ds.planner.streams import streams_step
from mst_ds.planner.types import MemoryTerm, Phase, total_bytes
from mst_ds.planner.workload import Workload, remembered, remembered_computing

Terms = tuple[MemoryTerm, ...]


def step_phases(work: Workload) -> tuple[Phase, ...]:
    """All phases, in the order in which they happen."""
    mlp_chunks, loss_chunks = work.settings.mlp_chunks, work.settings.loss_chunks
    # Terms get these counts as arguments: what is remembered is of any.
    work = work.with_settings(mlp_chunks=1, loss_chunks=1)
    return (
        states_phase(work),
        layer_phase(work, mlp_chunks, backward=False),
        loss_phase(work, loss_chunks),
        layer_phase(work, mlp_chunks, backward=True),
        Phase(
            "optimizer_step",
            _standing(work, has_gradients=False) + states.optimizer_step(work) + kept_on_host(work),
        ),
    )


def states_phase(work: Workload) -> Phase:
    """While the engine is built: the states, and nothing of a sequence."""
    return Phase("initialisation", _standing(work, has_gradients=work.zero.stage == 3) + states.parameter_blocks(work))


@remembered
def layer_phase(work: Workload, mlp_chunks: int, *, backward: bool) -> Phase:
    """The forward or the backward at its highest point: the last layer's largest operator, when all that layers keep is
    there; or in the backward the first layer's, when nearly all gradients are."""
    if backward and not states.has_gradients_from_start(work):
        phases = (_backward_making_gradients(work, mlp_chunks), _after_backward(work))
        return max(phases, key=lambda phase: phase.device_bytes)
    name: Literal["forward", "backward"] = "backward" if backward else "forward"
    standing = _standing_computing(work, name) + kept_on_host(work)
    if backward:
        standing += states.other_gradients(work)
    moments = (
        _on_device(_of_layers(layers, backward=backward) + largest)
        for layers in _last_layers(work)
        for largest in _moments(layers, mlp_chunks, backward=backward)
    )
    return Phase(name, standing + max(moments, key=total_bytes))


def _backward_making_gradients(work: Workload, mlp_chunks: int) -> Phase:
    """With each layer there are more gradients and less of what layers keep. Both change by as much every time, so that
    the highest point is at the last layer or at the first."""
    trained, num_layers = work.shape.trained, work.shape.num_hidden_layers
    after_layers = trained.all - trained.embedding
    # The layers after have their gradients already.
    so_far = [
        (layers, trained.head + (num_layers - layers.shape.num_hidden_layers) * trained.layer)
        for layers in _last_layers(work)
    ]
    so_far += [
        (layers, after_layers - layers.shape.num_hidden_layers * trained.layer) for layers in _first_layers(work)
    ]
    # A layer that is computed again gives its own all at its end.
    own = 0 if work.settings.recompute else trained.layer
    moments = [
        (layers, moment, count + (own if number else 0))
        for layers, count in so_far
        for number, moment in enumerate(_moments(layers, mlp_chunks, backward=True))
    ]
    standing = _standing(work, has_gradients=False) + states.reduce_bucket(work) + kept_on_host(work)
    standing += states.other_gradients(work)
    terms = (
        (*states.gradients(work, so_far=so_far), *_on_device(_of_layers(layers, backward=True) + largest))
        for layers, largest, so_far in moments
    )
    return Phase("backward", standing + max(terms, key=_device_bytes))


def _after_backward(work: Workload) -> Phase:
    """The gradients are averaged, and nothing that layers kept is left on the device."""
    standing = _standing(work, has_gradients=True) + states.gradient_reduction(work)
    return Phase("backward", standing + states.other_gradients(work) + kept_on_host(work))


@remembered_computing
def _of_layers(work: Workload, *, backward: bool) -> Terms:
    """What layers keep, and what goes from one to the next."""
    terms = activations.kept_between_layers(work, "backward" if backward else "forward")
    if backward:
        return terms + activations.output_gradient(work)
    if work.shape.position_parameter_count:
        # The decoder's forward holds what is embedded of tokens and of positions, and not their sum.
        return (*terms, activations.hidden_term(work, "embeddings", 2))
    if work.settings.offload_activations and work.shape.num_hidden_layers > (
        PARTS_IN_FLIGHT if work.layer_chunks == 1 else 1
    ):
        # The first layer's input, which the decoder holds until all layers have run, though it is on the host.
        terms += (activations.hidden_term(work, "embeddings", 1),)
    return terms


def _moments(work: Workload, mlp_chunks: int, *, backward: bool) -> list[Terms]:
    """The largest moment of the MLP, and those of all else."""
    mlp = max((step.terms for step in mlp_moments(work, mlp_chunks, backward=backward)), key=total_bytes)
    moments = [mlp, rest_of_layer_moment(work, backward=backward)]
    if backward and work.settings.recompute:
        moments.append(end_of_backward(work))
    return moments


@remembered_computing
def _last_layers(work: Workload) -> list[Workload]:
    """The model, and where some of its layers have a window and others not, or another shape, up to the last one of
    each other kind: what is there at that one may be more, though less is kept of those before it."""
    shape = work.shape
    last: dict[object, int] = {_kind(shape, layer): layer for layer in range(shape.num_hidden_layers)}
    if shape.num_hidden_layers > 1 and (shape.layer_embeddings_width or shape.handed_on_width):
        # From here on these have gradients.
        last["before the last"] = shape.num_hidden_layers - 2
    others = sorted(set(last.values()), reverse=True)
    if shape.layers_are_alike:
        return [work, *(_with_layers(work, layer + 1) for layer in others[1:])]
    return [_with_layers(work, layer + 1) for layer in others]


@remembered_computing
def _first_layers(work: Workload) -> list[Workload]:
    """The model as its activations are when the backward has come to the first layer, and to the first of each other
    kind."""
    shape = work.shape
    first = {_kind(shape, layer): layer for layer in reversed(range(shape.num_hidden_layers))}
    return [_with_layers(work, layer + 1) for layer in sorted(first.values())]


def _kind(shape: ModelShape, layer: int) -> tuple[LayerShape, bool]:
    return shape.layers[layer], layer in shape.window_layers


def _with_layers(work: Workload, count: int) -> Workload:
    return replace(work, shape=work.shape.first_layers(count))


def _device_bytes(terms: Terms) -> int:
    return sum([term.bytes for term in terms if term.place == "device"])


def _on_device(terms: Terms) -> Terms:
    return tuple(term for term in terms if term.place == "device")


@remembered
def loss_phase(work: Workload, loss_chunks: int) -> Phase:
    """The loss, which computes its gradients in the forward and scales them at the start of the backward."""
    # What the loss is computed from is free before its gradients are scaled.
    logits = (activations.hidden_term(work, "final_norm_output", 1), *activations.loss_logits(work, loss_chunks))
    largest = max(logits, activations.loss_scaling(work), key=total_bytes)
    return Phase("loss", _beside_logits(work) + largest)


@remembered
def _beside_logits(work: Workload) -> Terms:
    terms = _standing_computing(work, "loss") + activations.kept_between_layers(work, "loss")
    return terms + activations.loss_unchunked(work) + _saved(work, backward=False)


@remembered_computing
def mlp_moments(work: Workload, mlp_chunks: int, *, backward: bool) -> tuple[MlpStep, ...]:
    """The MLPs of a layer, each with what the layer's other operators have saved by then."""
    saved, whole = _saved(work, backward=backward), stream_terms(work, backward=backward)
    chunk, is_whole = work.of_chunk, work.layer_chunks == 1
    if backward and not is_whole:
        whole += parameter_sums(work)
    steps = mlp_steps(chunk, mlp_chunks, backward=backward, has_sums=is_whole)
    moments = tuple(MlpStep(step.chunk, (*step.rest, *whole), saved) for step in steps)
    return moments if not backward or is_whole else moments + _first_mlp_moments(work, mlp_chunks)


def _first_mlp_moments(work: Workload, mlp_chunks: int) -> tuple[MlpStep, ...]:
    """The MLPs of a layer's last chunk, which comes first: all that is kept is there, and no gradients but its own."""
    saved, whole = _saved(work, backward=True, of_last_chunk=True), carried_keys(work)
    if not work.settings.offload_activations:
        whole += kept_output_of_chunk(work)
    steps = mlp_steps(work.of_chunk, mlp_chunks, backward=True)
    return tuple(MlpStep(step.chunk, (*step.rest, *whole), saved) for step in steps)


@remembered_computing
def rest_of_layer_moment(work: Workload, *, backward: bool) -> Terms:
    """The largest operator of a layer beside its MLP, with what the layer has saved by then."""
    norm = activations.norm_step(work, backward=backward)
    final_norm_input = activations.hidden_term(work, "final_norm_input", 1)
    moments = [attention_moment(work, backward=backward)]
    if work.shape.residual_streams > 1:
        moments.append(_streams_moment(work, backward=backward))
    if work.settings.recompute:
        # The model's norm, beside which no layer runs.
        moments += [_norm_moment(work, backward=backward), (*norm, final_norm_input, *kept_gate_up(work))]
    else:
        # The model's norm finds all that layers saved. In the forward its input is counted with its output.
        moments.append((*norm, *[final_norm_input] * backward, *_saved(work, backward=backward)))
    return max(moments, key=total_bytes)


def _streams_moment(work: Workload, *, backward: bool) -> Terms:
    """The end of a layer that mixes several hidden states, where all that it saves is there."""
    step = streams_step(work.of_chunk if work.settings.recompute else work, backward=backward)
    return step + _saved(work, backward=backward) + stream_terms(work, backward=backward)


def attention_moment(work: Workload, *, backward: bool) -> Terms:
    """Attention of a layer, or of a chunk of it."""
    saved = _saved(work, backward=backward, after_attention=False, of_mlp=False)
    if backward and work.shape.norms.pre_norms == 1:
        # The MLP stands beside attention, and has given their input a gradient.
        saved += (activations.hidden_term(work.of_chunk, "mlp_input_gradient", 1),)
    if not work.settings.recompute:
        return activations.mixing_step(work, backward=backward) + saved
    if not backward:
        earlier = () if _reads_earlier(work) else None
        step = activations.mixing_step(work.of_chunk, backward=False, earlier=earlier)
        return step + saved + stream_terms(work, backward=False)
    if work.layer_chunks > 1 and work.shape.norms.pre_norms != 1:
        # That of a chunk's output is part of a whole, which is held until all chunks are done.
        saved += (activations.hidden_term(work.of_chunk, "residual_gradient", 1),)
    return max(_attention_backwards(work), key=total_bytes) + saved


def _attention_backwards(work: Workload) -> list[Terms]:
    """That of the last chunk, which comes first, before the input has a gradient, and of the one before it."""
    chunk, earlier = work.of_chunk, blocks_in_flight(work) if _reads_earlier(work) else None
    step = activations.mixing_step(chunk, backward=True, earlier=earlier)
    sums = parameter_sums(work, but=_input_projections(work.shape))
    if work.layer_chunks == 1:
        return [step + sums]
    last = sums + held_keys_values(chunk)
    after_kernel = tuple(term for term in step if term.kind != "workspace")
    # The first of two chunks reads no earlier keys.
    before = step if work.layer_chunks > 2 else activations.mixing_step(chunk, backward=True)
    return [
        step + last + carried_terms(work, but_a_chunk=_reads_earlier(work)),
        after_kernel + last + carried_terms(work),
        before + parameter_sums(work) + stream_terms(work, backward=True),
    ]


def _reads_earlier(work: Workload) -> bool:
    return work.layer_chunks > 1 and work.last_layer_has_attention and not work.last_layer_has_window


def _norm_moment(work: Workload, *, backward: bool) -> Terms:
    """The norm of the MLP's output, or the one before it, or where there is neither the layer's first, the last in its
    backward."""
    norms, trained = work.shape.norms, work.shape.trained
    is_first = norms.pre_norms == 1
    saved = _saved(
        work,
        backward=backward,
        of_attention=not is_first,
        after_attention=not is_first,
        of_mlp=norms.post_norms > 0,
    )
    step = activations.norm_step(work.of_chunk, backward=backward) + stream_terms(work, backward=backward)
    if not backward:
        return step + saved
    of_attention = _input_projections(work.shape) + work.shape.hidden_size * output_width(work.shape)
    missing = trained.layer if norms.post_norms else 0 if is_first else of_attention
    return step + saved + parameter_sums(work, but=missing if work.layer_chunks == 1 else 0)


def _input_projections(shape: ModelShape) -> int:
    return shape.hidden_size * projected_width(shape)


@remembered_computing
def _saved(
    work: Workload,
    *,
    backward: bool,
    of_attention: bool = True,
    after_attention: bool = True,
    of_mlp: bool = True,
    of_last_chunk: bool = False,
) -> Terms:
    """What the layers have saved, beside what `_of_layers` has; of the last layer those parts that are asked for, of
    its last chunk or of one before it."""
    if backward:
        layers = work.of_chunk if work.settings.recompute else work
        saved = activations.layer_activations(layers, of_attention=of_attention, after_attention=after_attention)
        of_last_chunk |= work.layer_chunks == 1
        if of_attention and of_last_chunk:
            saved += held_keys_values(layers)
        # On the device the last chunk has been differentiated before one before it; in flight are always two.
        is_there = of_last_chunk or work.settings.offload_activations
        return saved + kept_gate_up(work, of_last_part=of_mlp and is_there)
    if work.settings.recompute:
        return kept_gate_up(work, of_last_part=of_mlp)
    # All layers save while the forward goes on.
    return activations.layer_activations(work) + kept_gate_up(work)


@remembered
def _standing_computing(work: Workload, phase: Literal["forward", "loss", "backward"]) -> Terms:
    """The states of the model while it computes, at its last layer or the loss."""
    standing = _standing(work, has_gradients=states.has_gradients_from_start(work))
    return standing + states.gathered_parameters(work, phase)


@remembered
def _standing(work: Workload, *, has_gradients: bool) -> Terms:
    terms = states.reserve(work) + states.parameters(work) + states.optimizer_states(work)
    if has_gradients:
        terms += states.gradients(work) + states.reduce_bucket(work)
    return terms

"""The phases of a training step: which memory terms are alive together at each one's highest point."""

from __future__ import annotations

from mst_ds.planner import activations, states
from mst_ds.planner.kept import LAYERS_IN_FLIGHT, kept_on_host
from mst_ds.planner.mlp import MlpStep, mlp_steps
from mst_ds.planner.types import MemoryTerm, Phase, total_bytes
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]

# What is there whatever a micro-batch computes.
_STATES = frozenset(
    {
        "reserve",
        "parameters",
        "gathered_parameters",
        "gradients",
        "reduce_bucket",
        "master_parameters",
        "adam_moments",
    }
)


def activation_bytes(phase: Phase) -> int:
    """Of a phase's device memory what is no state of the model and none of ZeRO's buffers for these."""
    return total_bytes(term for term in phase.terms if term.place == "device" and term.name not in _STATES)


def step_phases(work: Workload, *, mlp_chunks: int, loss_chunks: int) -> tuple[Phase, ...]:
    """All phases, in the order in which they happen."""
    return (
        Phase("initialisation", _standing(work, has_gradients=work.zero.stage == 3)),
        layer_phase(work, mlp_chunks, backward=False),
        loss_phase(work, loss_chunks),
        layer_phase(work, mlp_chunks, backward=True),
        Phase(
            "optimizer_step",
            _standing(work, has_gradients=True) + states.optimizer_step(work) + kept_on_host(work),
        ),
    )


def layer_phase(work: Workload, mlp_chunks: int, *, backward: bool) -> Phase:
    """The forward or the backward at its highest point: the last layer's largest operator."""
    terms = _computing(work, backward=backward)
    if backward:
        terms += activations.output_gradient(work)
    elif work.offload_activations and work.shape.num_hidden_layers > LAYERS_IN_FLIGHT:
        # The first layer's input, which the decoder holds until all layers have run, though it is on the host.
        terms += (activations.hidden_term(work, "embeddings", 1),)
    mlps = (step.terms for step in mlp_moments(work, mlp_chunks, backward=backward))
    largest = max(*mlps, rest_of_layer_moment(work, backward=backward), key=total_bytes)
    return Phase("backward" if backward else "forward", terms + largest)


def loss_phase(work: Workload, loss_chunks: int) -> Phase:
    """The loss, which computes its gradients in the forward and scales them at the start of the backward."""
    terms = _computing(work, backward=False) + activations.loss_unchunked(work)
    if not work.recompute:
        terms += activations.layer_activations(work)
    # What the loss is computed from is free before its gradients are scaled.
    logits = (activations.hidden_term(work, "final_norm_output", 1), *activations.loss_logits(work, loss_chunks))
    largest = max(logits, activations.loss_scaling(work), key=total_bytes)
    return Phase("loss", terms + largest)


def mlp_moments(work: Workload, mlp_chunks: int, *, backward: bool) -> tuple[MlpStep, ...]:
    """The MLPs of a layer, each with what the layer's other operators have saved by then."""
    saved = _saved(work, backward=backward)
    return tuple(MlpStep(step.chunk, step.rest, saved) for step in mlp_steps(work, mlp_chunks, backward=backward))


def rest_of_layer_moment(work: Workload, *, backward: bool) -> Terms:
    """The largest operator of a layer beside its MLP, with what the layer has saved by then."""
    attention = activations.attention_step(work, backward=backward)
    norm = activations.norm_step(work, backward=backward)
    # The norm before the MLP, or where there is none the layer's first, the last in its backward. Without recompute the
    # model's final norm finds all that layers saved.
    is_last = work.recompute and work.shape.norms.pre_norms == 1
    return max(
        attention + _saved(work, backward=backward, after_attention=False),
        norm + _saved(work, backward=backward, of_attention=not is_last, after_attention=not is_last),
        key=total_bytes,
    )


def _saved(work: Workload, *, backward: bool, of_attention: bool = True, after_attention: bool = True) -> Terms:
    if not backward:
        # Without recompute all layers save while the forward goes on.
        return () if work.recompute else activations.layer_activations(work)
    return activations.layer_activations(work, of_attention=of_attention, after_attention=after_attention)


def _computing(work: Workload, *, backward: bool) -> Terms:
    """What stands while layers compute. Before the first backward there are gradients only where DeepSpeed
    allocates them at the start (stage 3), or where earlier micro-batches left theirs."""
    has_gradients = backward or work.zero.stage == 3 or work.zero.gradient_accumulation_steps > 1
    standing = _standing(work, has_gradients=has_gradients)
    return standing + states.gathered_parameters(work) + activations.kept_between_layers(work)


def _standing(work: Workload, *, has_gradients: bool) -> Terms:
    terms = states.reserve(work) + states.parameters(work) + states.optimizer_states(work)
    if has_gradients:
        terms += states.gradients(work) + states.reduce_bucket(work)
    return terms

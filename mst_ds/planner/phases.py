"""The phases of a training step: which memory terms are alive together at each one's highest point."""

from __future__ import annotations

from mst_ds.planner import activations, states
from mst_ds.planner.mlp import mlp_steps
from mst_ds.planner.types import MemoryTerm, Phase, total_bytes
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]


def step_phases(work: Workload, *, mlp_chunks: int, loss_chunks: int) -> tuple[Phase, ...]:
    """All phases, in the order in which they happen."""
    return (
        Phase("initialisation", _standing(work, has_gradients=work.zero.stage == 3)),
        layer_phase(work, mlp_chunks, backward=False),
        loss_phase(work, loss_chunks),
        layer_phase(work, mlp_chunks, backward=True),
        Phase("optimizer_step", _standing(work, has_gradients=True) + states.optimizer_step(work)),
    )


def layer_phase(work: Workload, mlp_chunks: int, *, backward: bool) -> Phase:
    """The forward or the backward at its highest point: the last layer's largest operator."""
    terms = _computing(work, backward=backward)
    if backward:
        terms += activations.output_gradient(work)
        if work.recompute:
            terms += activations.layer_activations(work)
    mlps = (step.terms for step in mlp_steps(work, mlp_chunks, backward=backward))
    largest = max(*mlps, rest_of_layer_step(work, backward=backward), key=total_bytes)
    return Phase("backward" if backward else "forward", terms + largest)


def loss_phase(work: Workload, loss_chunks: int) -> Phase:
    """The loss, which computes its gradients in the forward and scales them at the start of the backward."""
    terms = _computing(work, backward=False) + activations.loss_unchunked(work)
    largest = max(activations.loss_logits(work, loss_chunks), activations.loss_scaling(work), key=total_bytes)
    return Phase("loss", terms + largest)


def rest_of_layer_step(work: Workload, *, backward: bool) -> Terms:
    """The largest operator of a layer beside its MLP."""
    attention = activations.attention_step(work, backward=backward)
    return max(attention, activations.norm_step(work, backward=backward), key=total_bytes)


def _computing(work: Workload, *, backward: bool) -> Terms:
    """What stands while layers compute. Before the first backward there are gradients only where DeepSpeed
    allocates them at the start (stage 3), or where earlier micro-batches left theirs."""
    has_gradients = backward or work.zero.stage == 3 or work.zero.gradient_accumulation_steps > 1
    standing = _standing(work, has_gradients=has_gradients)
    return standing + states.gathered_parameters(work) + activations.kept_between_layers(work)


def _standing(work: Workload, *, has_gradients: bool) -> Terms:
    terms = states.parameters(work) + states.optimizer_states(work)
    if has_gradients:
        terms += states.gradients(work) + states.reduce_bucket(work)
    return terms

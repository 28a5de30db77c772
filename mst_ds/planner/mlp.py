"""Memory terms of the chunked MLP: dense, of experts, and shared beside experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mst_ds.geometry import EXPERTS_OF_A_GRADIENT, ceil_divide
from mst_ds.model_shape import ExpertShape
from mst_ds.planner.activations import hidden_term
from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]
Factor = tuple[str, int]

_FP32_BYTES = 4
# How many tensors of a chunk are alive that an activation has made, at most in its forward, its output among them, and
# at most from there to the end of its backward, without an output that autograd does not keep. By transformers' names;
# one of each where one kernel computes it from its input. Others keep their output, or are several operations, of
# which autograd keeps what each needs. The tests count them.
TENSORS_OF_ACTIVATION: Mapping[str, tuple[int, int]] = {
    "gelu_10": (2, 3),
    "gelu_accurate": (3, 6),
    "gelu_fast": (4, 8),
    "gelu_new": (3, 6),
    "gelu_python": (3, 8),
    "gelu_python_tanh": (3, 6),
    "laplace": (3, 7),
    "quick_gelu": (2, 4),
    "relu": (1, 2),
    "relu2": (2, 4),
    "sigmoid": (1, 2),
    "sqrtsoftplus": (2, 3),
    "tanh": (1, 2),
}


@dataclass(frozen=True)
class MlpStep:
    """What an MLP needs at one moment: the terms that more chunks make smaller, and the others.

    saved: what the layer's other operators have saved by then.
    """

    chunk: Terms
    rest: Terms
    saved: Terms = ()

    @property
    def terms(self) -> Terms:
        return self.saved + self.rest + self.chunk


def mlp_steps(work: Workload, chunks: int, *, backward: bool, has_sums: bool = True) -> tuple[MlpStep, ...]:
    """The moments at which the MLPs of the model's layers can need most.

    Args:
        has_sums: whether the sums of weight gradients count here: those of a layer in several chunks are there before.
    """
    shape, experts = work.shape, work.shape.experts
    steps: tuple[MlpStep, ...] = ()
    if shape.num_dense_layers:
        steps += _dense_steps(work, chunks, shape.intermediate_size, backward=backward, has_sums=has_sums)
    if experts is not None:
        steps += (_expert_step(work, chunks, experts, backward=backward, has_sums=has_sums),)
        if experts.shared_intermediate_size:
            width = experts.shared_intermediate_size
            shared = _dense_steps(work, chunks, width, backward=backward, has_sums=has_sums)
            # The experts' own result waits to be added.
            routed = hidden_term(work, "experts_result", 1)
            steps += tuple(MlpStep(step.chunk, (*step.rest, routed)) for step in shared)
    return steps


def _dense_steps(
    work: Workload, chunks: int, intermediate_size: int, *, backward: bool, has_sums: bool
) -> tuple[MlpStep, ...]:
    """Forward: the gate, and what its activation makes, or up. Backward: gate, up, the product or its gradient, and
    what the activation and its gradient make; at its end the weights' gradients in 16 bits beside their sums in fp32.
    One less in both where gate and up are kept."""
    matrices = 3 if work.shape.gated_mlp else 2
    chunk = product_term(
        "mlp_chunk",
        "device",
        ("tensors", _chunk_tensors(work, matrices, backward=backward)),
        ("chunk tokens", work.chunk_tokens(chunks)),
        ("intermediate_size", intermediate_size),
        ("bytes", work.zero.dtype_bytes),
    )
    if not backward:
        return (MlpStep((chunk,), (*_held_in_forward(work), hidden_term(work, "mlp_output", 1))),)
    input_gradient = hidden_term(work, "mlp_input_gradient", 1)
    weights = _trained_weights(work, ("matrices", matrices), ("intermediate_size", intermediate_size))
    if not weights or not has_sums:
        return (MlpStep((chunk,), (input_gradient,)),)
    sums = product_term("mlp_weight_gradients", "device", *weights, ("bytes", _FP32_BYTES))
    step = MlpStep((chunk,), (input_gradient, sums))
    if work.zero.dtype_bytes == _FP32_BYTES or work.settings.recompute:  # a layer's are rounded at its end
        return (step,)
    rounded = product_term("rounded_weight_gradients", "device", *weights, ("bytes", work.zero.dtype_bytes))
    return (step, MlpStep((), (input_gradient, sums, rounded)))


def _chunk_tensors(work: Workload, matrices: int, *, backward: bool) -> int:
    """Of intermediate size. An MLP with adapters is differentiated by autograd. Forward: the gate, and of a projection
    its output, what its adapter adds, and their sum. Backward: what autograd keeps, which is gate, activation, up and
    product, and two gradients."""
    of_forward, of_backward = TENSORS_OF_ACTIVATION.get(work.shape.activation, (1, 1))
    if work.shape.trained.mlp:
        return 2 * matrices - 1 + of_backward if backward else matrices + of_forward
    return (matrices + of_backward if backward else 1 + of_forward) - work.settings.keep_mlp


def _expert_step(work: Workload, chunks: int, experts: ExpertShape, *, backward: bool, has_sums: bool) -> MlpStep:
    """A chunk is of one expert's tokens, or of several experts' that are no more. Sums over a token's experts are in
    fp32, and the sum over chunks of one expert's weight gradients; those of all experts are in the model's dtype, or in
    a layer that is computed again in fp32, too.

    How many tensors a chunk has is measured: gate and up are one tensor of twice the size, differentiated by autograd.
    """
    size, hidden = work.zero.dtype_bytes, work.shape.hidden_size
    # At worst all tokens go to one expert; a token goes to it once.
    rows = min(work.tokens, ceil_divide(work.tokens * experts.num_experts_per_tok, chunks))
    of_hidden, of_intermediate = (3, 11) if backward else (4, 5)
    chunk = (
        product_term(
            "mlp_chunk",
            "device",
            ("tensors", of_intermediate),
            ("chunk tokens", rows),
            ("expert intermediate_size", experts.intermediate_size),
            ("bytes", size),
        ),
        product_term(
            "mlp_chunk_hidden_states",
            "device",
            ("tensors", of_hidden),
            ("chunk tokens", rows),
            ("hidden_size", hidden),
            ("bytes", size),
        ),
    )
    name = "mlp_input_gradient" if backward else "mlp_output"
    factors = (("tokens", work.tokens), ("hidden_size", hidden), ("bytes", _FP32_BYTES))
    sums = product_term(f"{name}_sum", "device", *factors)
    rounded = (hidden_term(work, name, 1),) if size < _FP32_BYTES else ()
    if not backward:
        return MlpStep(chunk, (*_held_in_forward(work), sums, *rounded))
    matrices = ("matrices", 3 if work.shape.gated_mlp else 2)
    weights = _trained_weights(work, matrices, ("expert intermediate_size", experts.intermediate_size))
    if not weights:
        return MlpStep(chunk, (sums, *rounded))
    several = _of_several_experts(work, experts)
    if not has_sums:
        return MlpStep(chunk, (sums, *rounded, *several))
    # Adapters are counted over all experts already.
    all_experts = (("experts", experts.num_experts),) if work.shape.trained.mlp is None else ()
    if work.settings.recompute:
        of_all = product_term("expert_weight_gradients", "device", *all_experts, *weights, ("bytes", _FP32_BYTES))
        return MlpStep(chunk, (sums, *rounded, of_all, *several))
    return MlpStep(
        chunk,
        (
            sums,
            *rounded,
            product_term("expert_weight_gradients", "device", *all_experts, *weights, ("bytes", size)),
            _expert_weight_gradients(work, experts, weights),
        ),
    )


def _expert_weight_gradients(work: Workload, experts: ExpertShape, weights: tuple[Factor, ...]) -> MemoryTerm:
    """Those that are being computed: of one expert in fp32. In bf16 a GPU may do several experts in one product, one
    matrix after the other, gate and up being one; so what is larger."""
    of_one = product_term("mlp_weight_gradients", "device", *weights, ("bytes", _FP32_BYTES))
    return max((of_one, *_of_several_experts(work, experts)), key=lambda term: term.bytes)


def _of_several_experts(work: Workload, experts: ExpertShape) -> Terms:
    if work.zero.dtype != "bf16" or work.shape.trained.mlp is not None:
        return ()
    return (
        product_term(
            "mlp_weight_gradients",
            "device",
            ("experts of a product", min(experts.num_experts, EXPERTS_OF_A_GRADIENT)),
            ("matrices", 2 if work.shape.gated_mlp else 1),
            ("hidden_size", work.shape.hidden_size),
            ("expert intermediate_size", experts.intermediate_size),
            ("bytes", work.zero.dtype_bytes),
        ),
    )


def _trained_weights(work: Workload, matrices: Factor, intermediate_size: Factor) -> tuple[Factor, ...]:
    """The factors of how many weights of an MLP have a gradient; none where it is frozen."""
    if work.shape.trained.mlp is None:
        return matrices, ("hidden_size", work.shape.hidden_size), intermediate_size
    return (("trained parameters", work.shape.trained.mlp),) if work.shape.trained.mlp else ()


def _held_in_forward(work: Workload) -> Terms:
    """Without recompute the first two are counted among the kept activations. The layers of a decoder with learned
    positions, GPT-2's, hold attention's result beside its sum with their input."""
    held: Terms = (hidden_term(work, "attention_result", 1),) if work.shape.position_parameter_count else ()
    if work.settings.recompute:
        held += (hidden_term(work, "residual", 1), hidden_term(work, "mlp_input", 1))
    return held

"""What to say when a device runs out of memory: the phase, what the plan has in it, the setting to change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from mst_ds.config import GIB
from mst_ds.planner import MemoryTerm, Plan

_SHOWN_TERMS = 3
_OTHERWISE = "a larger sp_size in the 'mst' block, or a shorter seq_len"
_RECOMPUTE = "recompute true in the 'mst' block"
# Without recompute these are no settings.
_OF_CHUNK = "a larger layer_chunks in the 'mst' block"
_OFFLOAD = "offload_activations true in the 'mst' block"
# What a layer computes of one chunk.
_CHUNK_TERMS = (
    "attention_",
    "shared_gradient_sums",
    "query_key_value",
    "kernel_",
    "folded_heads",
    "merged_in_fp32",
    "block_",
    "chunk_output",
    "residual",
    "mlp_input",
    "mlp_output",
)
# The beginning of a term's name, and what makes such a term smaller.
_REMEDIES = (
    ("mlp_chunk", "a larger mlp_chunks in the 'mst' block"),
    ("loss_logits", "a larger loss_chunks in the 'mst' block"),
    ("persistent_parameters", "a smaller stage3_param_persistence_threshold"),
    ("gathered_parameters", "a smaller stage3_max_reuse_distance and stage3_prefetch_bucket_size"),
    ("gathered_", _OF_CHUNK),
    ("all_to_all_buffers", _OF_CHUNK),
    ("layer_inputs", _OFFLOAD),
    *((name, _OF_CHUNK) for name in _CHUNK_TERMS),
    # Of all tokens, whatever the chunks.
    *((name, _OTHERWISE) for name in ("key_value_gradients", "carried_keys_values", "layer_output", "layer_input")),
    ("kept_gate_up", "keep_mlp false in the 'mst' block"),
    ("kept_", _OFFLOAD),
    ("parameters", "a higher ZeRO stage, more ranks, or offload_param"),
    ("gradients", "a higher ZeRO stage, more ranks, or offload_optimizer"),
    ("master_parameters", "a higher ZeRO stage, more ranks, or offload_optimizer"),
    ("optimizer_moments", "a higher ZeRO stage, more ranks, or offload_optimizer"),
    ("fp32_gradient", "a smaller sub_group_size, or offload_optimizer"),
)
# How torch's allocator for the CPU says it: no exception of its own.
_OF_CPU = "can't allocate memory"


class OutOfMemoryError(MemoryError):
    """A device has no memory left in one of these phases of a plan."""

    def __init__(self, phases: Sequence[str]) -> None:
        super().__init__(f"out of memory in the {' or '.join(phases)}")
        self.phases = tuple(phases)


@contextmanager
def during(*phases: str) -> Iterator[None]:
    """Within, what torch raises when memory runs out says in which phases of the plan that was.

    Raises:
        OutOfMemoryError: in place of torch's.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(phases) from error
    except RuntimeError as error:
        if _OF_CPU not in str(error):
            raise
        raise OutOfMemoryError(phases) from error


def explanation(error: OutOfMemoryError, plan: Plan) -> str:
    """One line: the phase, what the plan has in it, its largest terms, and the setting to change."""
    phase = max((phase for phase in plan.phases if phase.name in error.phases), key=lambda phase: phase.device_bytes)
    terms = sorted((term for term in phase.terms if term.place == "device"), key=lambda term: -term.bytes)[
        :_SHOWN_TERMS
    ]
    largest = ", ".join(f"{term.name} {term.bytes / GIB:.2f}" for term in terms)
    if plan.fits:
        excess = "more than the plan has; a larger reserve_gib in the 'mst' block makes the next plan smaller"
    else:
        excess = "as the plan said it would"
    return (
        f"ran out of memory in the {phase.name}, {excess}: planned are "
        f"{phase.device_bytes / GIB:.2f} of {plan.device_memory / GIB:.2f} GiB, of these {largest}; "
        f"allowed: {_remedy(terms, recompute=plan.settings.recompute)}"
    )


def _remedy(terms: Sequence[MemoryTerm], *, recompute: bool) -> str:
    """For the largest term for which there is one. What is in flight is on the host already."""
    on_device = (term for term in terms if not term.name.endswith("_in_flight"))
    found = (remedy for term in on_device for name, remedy in _REMEDIES if term.name.startswith(name))
    remedy = next(found, _OTHERWISE)
    return _RECOMPUTE if remedy in (_OF_CHUNK, _OFFLOAD) and not recompute else remedy

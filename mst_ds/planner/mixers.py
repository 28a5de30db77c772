"""Memory terms of mixers: layers that are not attention, by what was measured of them."""

from __future__ import annotations

from mst_ds.planner.types import MemoryTerm, product_term
from mst_ds.planner.workload import Workload

Terms = tuple[MemoryTerm, ...]


def saved_by_mixers(work: Workload, layers: int) -> Terms:
    """What those of so many layers leave for their backward, of layers that are alike."""
    mixer = work.shape.layers[-1].mixer
    return () if mixer is None else (_term(work, "mixer_saved", mixer.saved_bytes, layers),)


def mixer_step(work: Workload, *, backward: bool) -> Terms:
    """What the last layer's needs while it runs, beside what it leaves.

    With recompute its forward leaves nothing, and runs again before its backward.
    """
    mixer = work.shape.layers[-1].mixer
    if mixer is None:
        return ()
    if backward:
        needed = mixer.backward_bytes - mixer.saved_bytes
        if work.settings.recompute:
            needed = max(needed, mixer.saving_bytes - mixer.saved_bytes)
    elif work.settings.recompute:
        needed = mixer.forward_bytes
    else:
        needed = mixer.saving_bytes - mixer.saved_bytes
    return (_term(work, "mixer", needed, 1),)


def _term(work: Workload, name: str, of_token: int, layers: int) -> MemoryTerm:
    return product_term(name, "device", ("layers", layers), ("tokens", work.tokens), ("bytes of a token", of_token))

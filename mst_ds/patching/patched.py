"""A patched model: what its forwards need to know, and the forward that runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from mst_ds.eager_attention import register_eager_attention
from mst_ds.layer_stream import LayerStream
from mst_ds.sequence_parallel import SequenceGroup, register_attention
from mst_ds.settings import Settings
from mst_ds.structure import Chunkable, DocumentLengths, LossStructure
from mst_ds.token_layout import TokenLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class RunningForward:
    """The forward that runs; is_generating: with transformers' attention, which knows caches."""

    is_generating: bool = False


@dataclass(frozen=True)
class OwnConfig:
    """A config that `module` of this instance has for itself; attention_before is what it named before the plan,
    attention what it names with it."""

    module: nn.Module
    config: Any
    attention_before: str
    attention: str


@dataclass(frozen=True)
class PatchedModel:
    """What the forwards of a patched model need to know.

    Args:
        model: the causal language model.
        mlps: what of it is chunked.
        loss: its decoder, head, and the way to its loss.
        layers: the decoder layers that can be computed again.
        settings: this rank's.
        group: the sequence group; None at sp_size 1.
        stream: of its layers.
        forwards: of modules inside the decoder, and of the head, that were given one.
        configs: which name this project's attention; empty where the model keeps its own.
        why_own_attention: see `mst_ds.structure`.
        begins_with_each_document: see `mst_ds.structure`.
        document_lengths: what its rotary embeddings have to know of a forward; None where none depends on it.
        arguments: the names that its forward and its decoder's know; decoder_arguments: the decoder's alone.
        asked_for_router_logits: whether the config did when the plan was applied.
        running: the forward that runs.
    """

    model: PreTrainedModel
    mlps: Sequence[Chunkable]
    loss: LossStructure
    layers: Sequence[nn.Module]
    settings: Settings
    group: SequenceGroup | None
    stream: LayerStream
    forwards: Sequence[tuple[nn.Module, Any]]
    configs: Sequence[OwnConfig]
    why_own_attention: str | None
    arguments: frozenset[str]
    begins_with_each_document: bool
    document_lengths: DocumentLengths | None
    decoder_arguments: frozenset[str]
    asked_for_router_logits: bool
    running: RunningForward = field(default_factory=RunningForward)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model that was saved whole may be loaded by a process that has applied no plan.
        register_attention()
        register_eager_attention()
        self.__dict__.update(state)

    @property
    def name(self) -> str:
        """Of the model's class, for errors."""
        return type(self.model).__name__

    @property
    def token_layout(self) -> TokenLayout:
        """Which tokens of a sequence are this rank's."""
        return TokenLayout(self.settings.sp_size, self.settings.layer_chunks)


@contextmanager
def own_attention(patched: PatchedModel) -> Iterator[None]:
    """Within, a model generates with transformers' attention, which knows caches.

    Raises:
        ValueError: the sequence is sharded.
    """
    if patched.group is not None:
        raise ValueError("a model with sp_size > 1 cannot generate: call mst_ds.remove_plan(model) first")
    running = patched.running
    if running.is_generating:
        yield
        return
    running.is_generating = True
    for own in patched.configs:
        own.config._attn_implementation_internal = own.attention_before
    try:
        with patched.stream.paused():
            yield
    finally:
        running.is_generating = False
        for own in patched.configs:
            own.config._attn_implementation_internal = own.attention

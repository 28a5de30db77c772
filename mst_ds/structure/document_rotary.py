"""Rotary embeddings whose frequencies depend on how long a document is, each document with its own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mst_ds.structure.layers import decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_REFUSED = (
    "{} {}, while its rope_type is {!r}, whose frequencies depend on the length of a document: mst_ds cannot give each "
    "document its own; allowed: another rope_type in the config's rope_parameters"
)


@dataclass
class DocumentLengths:
    """Of the forward that runs: (B, L), for each token of this shard how long its document is.

    On the CPU where that is known without the device, for which the host then need not wait. None where a forward is
    transformers' own, such as one that generates.
    """

    of_tokens: Tensor | None = None


@dataclass(frozen=True)
class DocumentRotary:
    """A rotary embedding of transformers whose frequencies depend on the longest position that it is called with.

    Args:
        module: is called with (x, position_ids) of the tokens, and perhaps with a kind of layers that has its own
            frequencies.
        alone: a copy of the module. transformers' remembers the longest document that it has seen.
    """

    module: nn.Module
    alone: nn.Module

    def forward(
        self,
        lengths: DocumentLengths,
        original: Callable[..., Any],
        x: Tensor,
        position_ids: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """What the module gives for each document by itself: one or more tensors (B, L, ...).

        Raises:
            ValueError: called with other positions than those of the tokens.
        """
        kind = self._kind(args, kwargs)
        of_tokens = lengths.of_tokens
        if of_tokens is None or not _is_length_dependent(_rope_type(self.module, kind)):
            return original(x, position_ids, *args, **kwargs)
        if position_ids.dim() != 2 or position_ids.shape[1] != of_tokens.shape[1]:
            raise ValueError(
                f"{type(self.module).__name__} is called with positions of shape {tuple(position_ids.shape)}, not "
                "those of the tokens: mst_ds cannot give each document the frequencies of its length"
            )
        batch = max(len(position_ids), len(of_tokens))
        alike = self._alike(of_tokens, kind).expand(batch, -1)
        # Those of padding may be beyond the document's.
        longest = of_tokens.to(position_ids.device, non_blocking=True) - 1
        positions = torch.minimum(position_ids.expand(batch, -1), longest)

        def call(positions: Tensor, length: int) -> Any:
            # Behind the positions one more, the last of a document of this length.
            last = positions.new_full((len(positions), 1), length - 1)
            return self.alone(x, torch.cat([positions, last], dim=1), *args, **kwargs)

        call(positions[:1, :1] * 0, 1)  # forgets what it has seen
        # Ascending: after a longer one the module would not make new frequencies.
        different = alike.unique().tolist()
        if len(different) == 1:
            whole = call(positions, different[0])
            return _like(whole, [table[:, :-1] for table in _tensors(whole)])
        tables: list[Tensor] = []
        for length in different:
            indices = (alike == length).nonzero(as_tuple=True)
            where = tuple(index.to(positions.device, non_blocking=True) for index in indices)
            part = call(positions[where].unsqueeze(0), length)
            if not tables:
                tables = [table.new_empty(*positions.shape, *table.shape[2:]) for table in _tensors(part)]
            for table, values in zip(tables, _tensors(part), strict=True):
                table[where] = values[0, :-1]
        return _like(part, tables)

    def _kind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The kind of layers that it is called for, where each has its own frequencies."""
        return next(iter([*args, *kwargs.values()]), None) if isinstance(self.module.rope_type, dict) else None

    def _alike(self, lengths: Tensor, kind: str | None) -> Tensor:
        """Lengths with the same frequencies made one."""
        module: Any = self.module
        if _rope_type(module, kind) != "longrope":
            return lengths.clamp(min=module.original_max_seq_len)
        parameters = module.config.rope_parameters if kind is None else module.config.rope_parameters[kind]
        original = parameters["original_max_position_embeddings"]
        return lengths.clamp(min=original, max=original + 1)


def find_document_rotary(model: PreTrainedModel) -> list[DocumentRotary]:
    """The rotary embeddings of a model whose frequencies depend on the length.

    Raises:
        ValueError: one of them is not a module of transformers' that the decoder calls with its tokens' positions.
    """
    rotary = [module for module in model.modules() if hasattr(module, "rope_type")]
    inside_layers = {module for layer in decoder_layers(model) for module in layer.modules()}
    asked = [rope_type for rope_type in _types_of_config(model.config) if _is_length_dependent(rope_type)]
    if asked and not rotary:
        raise ValueError(_REFUSED.format(type(model).__name__, "has no rotary embedding of transformers'", asked[0]))
    found = []
    module: Any
    for module in rotary:
        dependent = [rope_type for rope_type in _types(module.rope_type) if _is_length_dependent(rope_type)]
        if not dependent:
            continue
        reason = None
        if module in inside_layers:
            reason = f"has {type(module).__name__} inside its layers"
        elif list(inspect.signature(module.forward).parameters)[:2] != ["x", "position_ids"]:
            reason = f"calls {type(module).__name__} with other arguments"
        if reason is not None:
            raise ValueError(_REFUSED.format(type(model).__name__, reason, dependent[0]))
        found.append(DocumentRotary(module, copy.deepcopy(module)))
    return found


def _is_length_dependent(rope_type: str | None) -> bool:
    return rope_type is not None and ("dynamic" in rope_type or rope_type == "longrope")


def _rope_type(module: Any, kind: str | None) -> str | None:
    rope_type: str | None = module.rope_type if kind is None else module.rope_type.get(kind)
    return rope_type


def _types(rope_type: str | Mapping[str, str]) -> Collection[str]:
    """One, or that of each kind of layers."""
    return rope_type.values() if isinstance(rope_type, Mapping) else [rope_type]


def _types_of_config(config: Any) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    entries = [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]
    return [entry["rope_type"] for entry in entries if "rope_type" in entry]


def _tensors(tables: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [tables] if isinstance(tables, Tensor) else tables


def _like(tables: Tensor | Sequence[Tensor], changed: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    return changed[0] if isinstance(tables, Tensor) else tuple(changed)

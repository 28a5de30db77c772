"""The forward of a patched model's decoder, whoever calls it: positions, documents and padding for its attention."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mst_ds.attention import DocumentStarts
from mst_ds.config import nearest
from mst_ds.patching.document_arguments import TABLE, ToldDocuments, take_document_starts
from mst_ds.patching.guards import check_unchanged
from mst_ds.patching.patched import PatchedModel, own_attention
from mst_ds.sequence_parallel import (
    UlyssesContext,
    document_lengths,
    find_document_starts,
    lengths_of_tokens,
    positions_in_documents,
)

# Of a causal language model, beside those that its class and transformers name.
_TARGETS = {"labels", "shift_labels", "num_items_in_batch", "ignore_index", "skip_logits"}
_TARGETS |= {"return_log_probs", "temperature"}
# What transformers' models take without naming it, and what a patched one does.
_ALWAYS = {"return_dict", "output_attentions", "cache_position", TABLE}


def decoder_forward(original: Callable[..., Any], patched: PatchedModel, *args: Any, **kwargs: Any) -> Any:
    """The decoder's own forward, with transformers' arguments, which tells attention what the plan says.

    Where `position_ids` do not go on by one, another document begins, which sees no other. Padding in `attention_mask`
    is not seen, and what stands before it and after it are documents of their own. A `document_table`, which
    `mst_ds.data.shard` makes of the whole sequence, is taken at its word: then nothing is read back from a device.

    Raises:
        ValueError: arguments for which the result would not be exact, or a model that was changed after its plan.
    """
    kwargs = named_arguments(original, args, kwargs)
    check_unchanged(patched)
    if patched.running.is_generating:
        return original(**kwargs)
    if uses_cache(kwargs):
        with own_attention(patched):
            return original(**kwargs)
    check_known(patched, kwargs)
    inputs = kwargs["input_ids"] if kwargs["input_ids"] is not None else kwargs.get("inputs_embeds")
    if inputs is None:
        raise ValueError(f"{patched.name} needs input_ids or inputs_embeds")
    patched.stream.begin_forward((inputs.shape[0], inputs.shape[1]))
    kwargs |= {**_planned_arguments(patched, kwargs, inputs), **without_cache(patched), **_of_all_tokens(patched)}
    patched.stream.context = kwargs.get("ulysses")
    try:
        return original(**kwargs)
    finally:
        patched.stream.context = None
        if patched.document_lengths is not None:
            patched.document_lengths.of_tokens = None


def named_arguments(original: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All of them by name, `input_ids` and `attention_mask` always."""
    positional = dict(zip(inspect.signature(original).parameters, args, strict=False)) if args else {}
    return {"input_ids": None, "attention_mask": None, **positional, **kwargs}


def uses_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether a forward is a step of generation, which transformers' attention does."""
    return bool(kwargs.get("use_cache")) or kwargs.get("past_key_values") is not None


def without_cache(patched: PatchedModel) -> dict[str, bool]:
    """What a decoder is told, so that it keeps no cache; nothing where it knows of none."""
    return {"use_cache": False} if "use_cache" in patched.decoder_arguments else {}


def _of_all_tokens(patched: PatchedModel) -> dict[str, int]:
    """What a decoder is told that could leave out tokens whose logits nobody wants (Gemma 4): attention is from all."""
    return {"logits_to_keep": 0} if "logits_to_keep" in patched.decoder_arguments else {}


def padding_mask(attention_mask: Any) -> Tensor | None:
    """The mask, None where nothing is padding.

    Raises:
        ValueError: a mask of another kind.
    """
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be (batch, length), 1 for tokens and 0 for padding; documents are told apart by "
            "position_ids that start again at 0"
        )
    return attention_mask


@functools.cache
def _names_of_transformers() -> frozenset[str]:
    from transformers.utils.generic import TransformersKwargs

    return frozenset(TransformersKwargs.__annotations__)


def known_arguments(*forwards: Callable[..., Any]) -> frozenset[str]:
    """The arguments that these forwards name, and those that transformers' models all take."""
    named: set[str] = set()
    for forward in forwards:
        parameters = inspect.signature(forward).parameters.values()
        named |= {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return _names_of_transformers() | named | _TARGETS | _ALWAYS


def check_known(patched: PatchedModel, kwargs: Mapping[str, Any]) -> None:
    """Refuse what transformers' models would swallow, and whoever passed it believe in.

    Raises:
        ValueError: an argument that no forward of the model knows.
    """
    for name, value in kwargs.items():
        if value is not None and name not in patched.arguments:
            raise ValueError(
                f"{patched.name} has no argument {name!r}, which would be ignored: leave it out"
                f"{nearest(name, patched.arguments)}"
            )


def _planned_arguments(patched: PatchedModel, kwargs: dict[str, Any], inputs: Tensor) -> dict[str, Any]:
    """The arguments that differ: positions in the whole sequence, and what attention has to know."""
    group, settings = patched.group, patched.settings
    mask, positions = padding_mask(kwargs["attention_mask"]), kwargs.get("position_ids")
    batch, length = inputs.shape[:2]
    told = take_document_starts(kwargs, batch, length, patched.token_layout)
    if patched.why_own_attention is not None:
        return _positions_for_own_attention(patched, told, positions, mask, inputs)
    if _wants(patched, kwargs, "output_attentions"):
        raise ValueError(
            "output_attentions: attention with a plan has no matrix of weights that it could give: set it to false"
        )
    if told is not None and not told.is_certain:
        if positions is not None:
            told.check(find_document_starts(positions, None, None))
        else:
            positions = told.positions(inputs.device)
    positions, starts = _find_documents(patched, told, positions, mask, inputs)
    of_keys = positions
    if of_keys is None:
        of_keys = patched.token_layout.positions(0 if group is None else group.rank, length, inputs.device)[None]
    context = UlyssesContext(group, settings.attention, starts, settings.head_groups, patched.stream, of_keys)
    # Without a mask transformers looks into the positions for documents, and has the host wait for the answer.
    is_certain = told is not None and told.is_certain
    no_padding = torch.ones(batch, length, dtype=torch.bool, device=inputs.device) if is_certain else None
    return {"attention_mask": no_padding, "position_ids": positions, "ulysses": context}


def _positions_for_own_attention(
    patched: PatchedModel, told: ToldDocuments | None, positions: Any, mask: Tensor | None, inputs: Tensor
) -> dict[str, Any]:
    """What differs where a model keeps its own attention.

    Raises:
        ValueError: a row holds more than one document.
    """
    is_certain = told is not None and told.is_certain
    is_packed = told is not None and told.is_packed
    if is_packed or (not is_certain and positions is not None and _has_documents(positions, mask)):
        raise ValueError(f"{patched.name} {patched.why_own_attention}: pass one document a row (--packing none)")
    if patched.document_lengths is None:
        return {}
    positions, _ = _find_documents(patched, told, positions, mask, inputs)
    if not is_certain and _has_documents(positions, mask):
        raise ValueError(f"{patched.name} {patched.why_own_attention}: pass rows with padding on one side")
    return {"position_ids": positions}


def _find_documents(
    patched: PatchedModel, told: ToldDocuments | None, positions: Any, mask: Tensor | None, inputs: Tensor
) -> tuple[Any, DocumentStarts | None]:
    """Positions in the whole sequence, None where they tell nothing new, and where documents begin. Rotary embeddings
    that depend on how long these are get to know it."""
    group, lengths, are_given = patched.group, patched.document_lengths, positions is not None
    if told is not None and told.lengths is not None:
        # Nothing is exchanged or read from the device: every rank has the table of the whole sequence.
        if lengths is not None:
            lengths.of_tokens = lengths_of_tokens(
                told.starts, told.lengths, told.length, group, patched.settings.layer_chunks
            )
        return positions, told.separate_starts
    if not are_given and (group is not None or mask is not None or lengths is not None):
        batch, length = inputs.shape[:2]
        rank = 0 if group is None else group.rank
        positions = patched.token_layout.positions(rank, length, inputs.device).expand(batch, -1)
    # On a shard always: another rank may have padding, and this is a collective call.
    starts = None if positions is None else find_document_starts(positions, mask, group)
    if positions is not None and not are_given and (lengths is not None or patched.begins_with_each_document):
        # A document is no longer for padding before it.
        positions = positions_in_documents(positions, starts, group)
    if lengths is not None:
        lengths.of_tokens = document_lengths(positions, mask, starts, group)
    return positions, starts


def _wants(patched: PatchedModel, kwargs: Mapping[str, Any], name: str) -> bool:
    """Whether a flag is set, by an argument or else by the config."""
    given = kwargs.get(name)
    return bool(getattr(patched.model.config, name, False) if given is None else given)


def _has_documents(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether a row holds more than one document; padding is none."""
    is_token = torch.ones_like(positions, dtype=torch.bool) if mask is None else (mask == 1)
    goes_on = is_token[:, :-1] & (positions[:, 1:] == positions[:, :-1] + 1)
    begins = (is_token[:, 1:] & ~goes_on).sum(dim=1) + is_token[:, 0]
    return bool((begins > 1).any())

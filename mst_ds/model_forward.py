"""What a patched model computes in place of its own forward: arguments for its shard, the decoder, the loss."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mst_ds.planner import Plan
from mst_ds.recompute import LayerRecompute
from mst_ds.router_loss import router_loss
from mst_ds.structure import Chunkable, LossStructure, MlpStructure
from mst_ds.ulysses import ATTENTION_NAME, SequenceGroup, UlyssesContext, find_document_starts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_IGNORE_INDEX = -100  # transformers' and torch's default


@dataclass(frozen=True)
class PatchedModel:
    """What the forward of a patched model needs to know.

    Args:
        model: whose forward is replaced.
        mlps: what of it is chunked.
        loss: its decoder, head, and the way to its loss.
        plan: this rank's.
        group: the sequence group; None at sp_size 1.
        recompute: of its layers.
        configs: this instance's own, which name the attention, with the one named before; empty where the model keeps
            its own attention.
        why_own_attention: see `mst_ds.structure`.
    """

    model: PreTrainedModel
    mlps: Sequence[Chunkable]
    loss: LossStructure
    plan: Plan
    group: SequenceGroup | None
    recompute: LayerRecompute
    configs: Sequence[tuple[Any, str]]
    why_own_attention: str | None

    @property
    def name(self) -> str:
        """Of the model's class, for errors."""
        return type(self.model).__name__


def model_forward(original: Callable[..., Any], patched: PatchedModel, *args: Any, **kwargs: Any) -> Any:
    """The forward of a causal language model under its plan, with transformers' arguments.

    With `labels` or `shift_labels` the loss without logits, else the logits. Where `position_ids` do not go on by one,
    another document begins, which sees no other. Padding in `attention_mask` is neither seen nor predicted from, and
    what stands before it and after it are documents of their own.

    Raises:
        ValueError: arguments for which the result would not be exact.
    """
    _check_mlps(patched)
    patched.recompute.begin_forward()
    positional = dict(zip(inspect.signature(original).parameters, args, strict=False)) if args else {}
    kwargs = {"input_ids": None, "attention_mask": None, **positional, **kwargs}
    targets = {name: kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
    ignore_index = kwargs.pop("ignore_index", _IGNORE_INDEX)
    return_dict = kwargs.pop("return_dict", None)
    wants_loss = targets["labels"] is not None or targets["shift_labels"] is not None
    uses_cache = kwargs.get("use_cache") or kwargs.get("past_key_values") is not None
    if not wants_loss and (uses_cache or _is_generating(patched)):
        with _own_attention(patched):
            return original(return_dict=return_dict, **kwargs)
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values, such as a learned prefix, cannot be trained with a plan: tokens attend to each other only"
        )
    if patched.group is not None:
        _check_targets_of_a_shard(**targets)
    mask = _padding(kwargs["attention_mask"])
    kwargs |= _attention_arguments(patched, mask, kwargs) | {"use_cache": False}
    if not wants_loss:
        return original(return_dict=return_dict, **kwargs)
    labels = _shifted_labels(targets["labels"], targets["shift_labels"], mask, ignore_index)
    output = _loss_forward(patched, labels, targets["num_items_in_batch"], ignore_index, mask, kwargs)
    return output.to_tuple() if return_dict is False else output


def model_generate(original: Callable[..., Any], patched: PatchedModel, *args: Any, **kwargs: Any) -> Any:
    """The `generate` of a patched model, which makes masks for transformers' attention before it calls the forward.

    Raises:
        ValueError: the sequence is sharded.
    """
    with _own_attention(patched):
        return original(*args, **kwargs)


_CHANGED = (
    "{} was changed after mst_ds.apply_plan, such as by an adapter: call mst_ds.remove_plan(model), "
    "then mst_ds.apply_plan again"
)


def _check_mlps(patched: PatchedModel) -> None:
    """Refuse linear layers that are the model's no more: an adapter added later would do nothing."""
    for mlp in patched.mlps:
        if isinstance(mlp, MlpStructure) and not {mlp.gate, mlp.up, mlp.down} <= {None, *mlp.module.children()}:
            raise ValueError(_CHANGED.format(type(mlp.module).__name__))


@contextmanager
def _own_attention(patched: PatchedModel) -> Iterator[None]:
    """Within, a model generates with transformers' attention, which knows caches."""
    if patched.group is not None:
        raise ValueError("a model with sp_size > 1 cannot generate: call mst_ds.remove_plan(model) first")
    names = [config._attn_implementation_internal for config, _ in patched.configs]
    for config, before in patched.configs:
        config._attn_implementation_internal = before
    try:
        yield
    finally:
        for (config, _), name in zip(patched.configs, names, strict=True):
            config._attn_implementation_internal = name


def _is_generating(patched: PatchedModel) -> bool:
    return any(config._attn_implementation_internal != ATTENTION_NAME for config, _ in patched.configs)


def _check_targets_of_a_shard(
    labels: Tensor | None, shift_labels: Tensor | None, num_items_in_batch: int | Tensor | None
) -> None:
    if labels is not None and shift_labels is None:
        raise ValueError(
            "with sp_size > 1 pass shift_labels in place of labels: a shard's last target is on the next rank, so "
            "labels are shifted before the sequence is sharded"
        )
    if shift_labels is not None and num_items_in_batch is None:
        raise ValueError(
            "with sp_size > 1 pass num_items_in_batch, the number of valid labels of the whole step over all ranks: "
            "one token, one weight"
        )


def _padding(attention_mask: Tensor | None) -> Tensor | None:
    """The mask, None where nothing is padding."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask must be (batch, length), 1 for tokens and 0 for padding; documents are told apart by "
            "position_ids that start again at 0"
        )
    return attention_mask


def _attention_arguments(patched: PatchedModel, mask: Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The decoder's arguments that differ: positions in the whole sequence, and what attention has to know."""
    group, plan = patched.group, patched.plan
    positions = kwargs.get("position_ids")
    if patched.why_own_attention is not None:
        if positions is not None and _has_documents(positions, mask):
            raise ValueError(f"{patched.name} {patched.why_own_attention}: pass one document a row (--packing none)")
        return {}
    inputs = kwargs["input_ids"] if kwargs["input_ids"] is not None else kwargs["inputs_embeds"]
    if positions is None and (group is not None or mask is not None):
        batch, length = inputs.shape[:2]
        positions = (torch.arange(length, device=inputs.device) + plan.sp_rank * length).expand(batch, -1)
    # On a shard always: another rank may have padding, and this is a collective call.
    starts = None if positions is None else find_document_starts(positions, mask, group)
    context = UlyssesContext(group, plan.attention, starts, plan.head_groups, patched.recompute)
    return {"attention_mask": None, "position_ids": positions, "ulysses": context}


def _has_documents(positions: Tensor, mask: Tensor | None) -> bool:
    """Whether a row holds more than one document; padding is none."""
    is_token = torch.ones_like(positions, dtype=torch.bool) if mask is None else (mask == 1)
    goes_on = is_token[:, :-1] & (positions[:, 1:] == positions[:, :-1] + 1)
    begins = (is_token[:, 1:] & ~goes_on).sum(dim=1) + is_token[:, 0]
    return bool((begins > 1).any())


def _shifted_labels(
    labels: Tensor | None, shift_labels: Tensor | None, mask: Tensor | None, ignore_index: int
) -> Tensor:
    given = shift_labels if shift_labels is not None else labels
    assert given is not None
    if mask is not None and bool(((mask == 0) & (given != ignore_index)).any()):
        which = "labels" if shift_labels is None else "shift_labels"
        raise ValueError(
            f"{which} must be {ignore_index} where attention_mask is 0: padding is no target, and sees nothing"
        )
    if shift_labels is not None:
        return shift_labels
    shifted = nn.functional.pad(given[..., 1:], (0, 1), value=ignore_index)
    # The first token after padding on the left has nothing that it could be predicted from.
    return shifted if mask is None else shifted.masked_fill(mask == 0, ignore_index)


def _loss_forward(
    patched: PatchedModel,
    labels: Tensor,
    num_items_in_batch: int | Tensor | None,
    ignore_index: int,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Any:
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    structure, model = patched.loss, patched.model
    if model.get_output_embeddings() is not structure.head:
        raise ValueError(_CHANGED.format("the LM head"))
    routes = kwargs.get("output_router_logits")
    routes = structure.router_is_on if routes is None else routes
    if structure.router is not None:
        kwargs["output_router_logits"] = routes
    elif routes:
        raise ValueError(f"{patched.name} has no router loss that mst_ds knows: set output_router_logits to false")
    outputs = structure.decoder(**kwargs)
    loss = structure.head(
        outputs.last_hidden_state, labels=labels, num_items_in_batch=num_items_in_batch, ignore_index=ignore_index
    )
    aux_loss = None
    if routes:
        valid = labels != ignore_index
        aux_loss, weight = _router_loss(patched, outputs.router_logits, valid, num_items_in_batch, mask)
        loss = loss + (weight * aux_loss).to(loss.device)
    if loss.requires_grad:
        loss.register_hook(functools.partial(_check_trained, model, _trained(model)))
    return MoeCausalLMOutputWithPast(
        loss=loss,
        aux_loss=aux_loss,
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
        router_logits=outputs.get("router_logits"),
    )


def _trained(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


def _check_trained(model: nn.Module, trained: list[bool], grad: Tensor) -> None:
    """When a backward begins: what it computes again has to be what the forward computed."""
    if _trained(model) != trained:
        raise ValueError(
            "which parameters are trained was changed between forward and backward, such as by another adapter: "
            "call backward first"
        )


def _router_loss(
    patched: PatchedModel,
    router_logits: Sequence[Tensor],
    valid: Tensor,
    num_items_in_batch: int | Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor | float]:
    """This rank's part of the router loss, and its weight: the coefficient times the sequence's share of the labels."""
    group, router = patched.group, patched.loss.router
    assert router is not None
    all_reduce = None if group is None else group.all_reduce
    aux_loss = router_loss(
        router_logits, router.top_k, mask=None if mask is None else mask.flatten(), sum_over_ranks=all_reduce
    )
    if num_items_in_batch is None:
        return aux_loss, router.coefficient
    num_valid = valid.sum()
    if all_reduce is not None:
        all_reduce(num_valid)
    num_items = torch.as_tensor(num_items_in_batch, device=num_valid.device).clamp(min=1)
    return aux_loss, router.coefficient * num_valid / num_items

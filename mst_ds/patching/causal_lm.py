"""The forward of a patched causal language model: its decoder, then loss or log-probabilities in chunks, or logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mst_ds.config import IGNORE_INDEX
from mst_ds.minisequence.router_loss import router_loss
from mst_ds.patching.decoder import check_known, named_arguments, padding_mask, uses_cache, without_cache
from mst_ds.patching.document_arguments import TABLE
from mst_ds.patching.guards import CHANGED
from mst_ds.patching.logits import LogitsLeftOutByThePlan, compute_logits, take_logits_wanted, warn_of_logits
from mst_ds.patching.patched import PatchedModel, own_attention


def causal_lm_forward(original: Callable[..., Any], patched: PatchedModel, *args: Any, **kwargs: Any) -> Any:
    """The forward of a causal language model under its plan, with transformers' arguments.

    With `labels` or `shift_labels` the loss, and logits only where `skip_logits=False` or `logits_to_keep` asks for
    them; else the logits. Padding in `attention_mask` is not
    predicted from. For all else see `mst_ds.patching.decoder`.

    With `return_log_probs=True` beside labels there is no loss but `log_probs`, (B, L) in fp32 at least: `log_probs[t]`
    is that of the label which token t predicts, under logits divided by `temperature`, and 0 where it is ignored; of a
    shard its own tokens'. A router loss is then not in it: `aux_loss` is this rank's part, for the caller to add.

    Raises:
        ValueError: arguments for which the result would not be exact.
    """
    # accelerate's unwrap_model(keep_fp32_wrapper=False) makes a method of what it had wrapped.
    args = args[1:] if args and args[0] is patched.model else args
    kwargs = named_arguments(original, args, kwargs)
    targets = {name: kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
    ignore_index = kwargs.pop("ignore_index", IGNORE_INDEX)
    temperature = _take_temperature(kwargs, targets)
    return_dict = kwargs.pop("return_dict", None)
    wants_loss = targets["labels"] is not None or targets["shift_labels"] is not None
    logits_wanted = take_logits_wanted(kwargs, wants_loss=wants_loss)
    if not wants_loss and (uses_cache(kwargs) or patched.running.is_generating):
        with own_attention(patched):
            return original(return_dict=return_dict, **kwargs)
    check_known(patched, kwargs)
    if kwargs.get("past_key_values") is not None:
        raise ValueError(
            "past_key_values, such as a learned prefix, cannot be trained with a plan: tokens attend to each other only"
        )
    if patched.group is not None:
        _check_targets_of_a_shard(**targets, needs_count=temperature is None)
    mask = padding_mask(kwargs["attention_mask"])
    kwargs.pop("use_cache", None)
    kwargs |= without_cache(patched)
    if not wants_loss:
        warn_of_logits(patched, kwargs)
        return original(return_dict=return_dict, **kwargs)
    if mask is not None and kwargs.get(TABLE) is None:
        # Who made the table has looked at the labels, too.
        _require_no_targets_on_padding(targets, mask, ignore_index)
    labels = _shifted_labels(targets["labels"], targets["shift_labels"], mask, ignore_index)
    of_head = (
        {"num_items_in_batch": targets["num_items_in_batch"]} if temperature is None else {"temperature": temperature}
    )
    output, hidden_states = _loss_forward(patched, labels, ignore_index, of_head, mask, kwargs)
    if logits_wanted is not None:
        output["logits"] = compute_logits(patched, hidden_states, logits_wanted)
    return output.to_tuple() if return_dict is False else output


def generate(original: Callable[..., Any], patched: PatchedModel, *args: Any, **kwargs: Any) -> Any:
    """The `generate` of a patched model, which makes masks for transformers' attention before it calls the forward.

    Raises:
        ValueError: the sequence is sharded.
    """
    with own_attention(patched):
        return original(*args, **kwargs)


def _take_temperature(kwargs: dict[str, Any], targets: Mapping[str, Any]) -> float | None:
    """Take out of a forward's arguments at what temperature it wants log-probabilities; None where it wants none.

    Raises:
        ValueError: there is nothing that they could be of, or something beside them would be without effect.
    """
    wants, temperature = kwargs.pop("return_log_probs", None), kwargs.pop("temperature", None)
    if not wants:
        if temperature is not None:
            raise ValueError("temperature is for log-probabilities: pass return_log_probs=True, or leave it out")
        return None
    if targets["labels"] is None and targets["shift_labels"] is None:
        raise ValueError("return_log_probs is true, and there are no labels whose they would be: pass labels")
    if targets["num_items_in_batch"] is not None:
        raise ValueError("num_items_in_batch divides a loss, and return_log_probs asks for none: leave it out")
    return 1.0 if temperature is None else float(temperature)


def _check_targets_of_a_shard(
    labels: Tensor | None,
    shift_labels: Tensor | None,
    num_items_in_batch: int | Tensor | None,
    *,
    needs_count: bool,
) -> None:
    if labels is not None and shift_labels is None:
        raise ValueError(
            "with sp_size > 1 pass shift_labels in place of labels: a shard's last target is on the next rank, so "
            "labels are shifted before the sequence is sharded"
        )
    if needs_count and shift_labels is not None and num_items_in_batch is None:
        raise ValueError(
            "with sp_size > 1 pass num_items_in_batch, the number of valid labels of the whole step over all ranks: "
            "one token, one weight"
        )


def _require_no_targets_on_padding(targets: Mapping[str, Any], mask: Tensor, ignore_index: int) -> None:
    which = "labels" if targets["shift_labels"] is None else "shift_labels"
    if bool(((mask == 0) & (targets[which] != ignore_index)).any()):
        raise ValueError(
            f"{which} must be {ignore_index} where attention_mask is 0: padding is no target, and sees nothing"
        )


def _shifted_labels(
    labels: Tensor | None, shift_labels: Tensor | None, mask: Tensor | None, ignore_index: int
) -> Tensor:
    given = shift_labels if shift_labels is not None else labels
    assert given is not None
    if shift_labels is not None:
        return shift_labels
    shifted = nn.functional.pad(given[..., 1:], (0, 1), value=ignore_index)
    # The first token after padding on the left has nothing that it could be predicted from.
    return shifted if mask is None else shifted.masked_fill(mask == 0, ignore_index)


def _loss_forward(
    patched: PatchedModel,
    labels: Tensor,
    ignore_index: int,
    of_head: dict[str, Any],
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Any, Tensor]:
    """The output with its loss or log-probabilities and without logits, and the hidden states that these would come
    from.

    Args:
        of_head: {"num_items_in_batch"} for the loss, {"temperature"} for log-probabilities.
    """
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    structure, model = patched.loss, patched.model
    if model.get_output_embeddings() is not structure.head:
        raise ValueError(CHANGED.format("the LM head", "an adapter or new tokens"))
    for name, value in kwargs.items():
        if value is not None and name not in patched.decoder_arguments:
            raise ValueError(
                f"{patched.name} does something with {name} that its loss in chunks does not: leave it out"
            )
    routes = _wants_router_loss(patched, kwargs.get("output_router_logits"))
    if structure.router is not None:
        kwargs["output_router_logits"] = routes
    outputs = structure.decoder(**kwargs)
    hidden_states = structure.head_input(outputs.last_hidden_state)
    result = structure.head(hidden_states, labels=labels, ignore_index=ignore_index, **of_head)
    is_loss = "temperature" not in of_head
    aux_loss = None
    if routes:
        valid = labels != ignore_index
        aux_loss, weight = _router_loss(patched, outputs.router_logits, valid, of_head.get("num_items_in_batch"), mask)
        if is_loss:
            result = result + (weight * aux_loss).to(result.device)
    if result.requires_grad:
        result.register_hook(functools.partial(_check_trained, model, _trained(model)))
    output = MoeCausalLMOutputWithPast(
        loss=result if is_loss else None,
        aux_loss=aux_loss,
        logits=LogitsLeftOutByThePlan(),  # type: ignore[arg-type]
        hidden_states=outputs.get("hidden_states"),
        attentions=outputs.get("attentions"),
        router_logits=outputs.get("router_logits"),
    )
    if not is_loss:
        output["log_probs"] = result
    return output, hidden_states


def _wants_router_loss(patched: PatchedModel, given: bool | None) -> bool:
    """By the argument, or else by the config as it is now.

    Raises:
        ValueError: the model has none that is known.
    """
    asked = bool(getattr(patched.model.config, "output_router_logits", False))
    if given is not None:
        routes = bool(given)
    else:
        # A model without such a loss may have been told to give router logits all along.
        routes = patched.loss.router_is_on if asked == patched.asked_for_router_logits else asked
    if routes and patched.loss.router is None:
        raise ValueError(f"{patched.name} has no router loss that mst_ds knows: set output_router_logits to false")
    return routes


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
    # As transformers reads it, at each forward.
    coefficient = float(getattr(patched.model, "router_aux_loss_coef", router.coefficient))
    if num_items_in_batch is None:
        return aux_loss, coefficient
    num_valid = valid.sum()
    if all_reduce is not None:
        all_reduce(num_valid)
    num_items = torch.as_tensor(num_items_in_batch, device=num_valid.device).clamp(min=1)
    return aux_loss, coefficient * num_valid / num_items

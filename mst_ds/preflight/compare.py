"""The loss and the gradients of a plain model, and those of its copy under a plan, on the same documents in float64."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mst_ds.geometry import shard_length
from mst_ds.layer_stream import stream_of
from mst_ds.patching import apply_settings, find_parts
from mst_ds.preflight.cases import Case
from mst_ds.preflight.errors import relative_error
from mst_ds.preflight.float64 import Float64
from mst_ds.preflight.sequences import Documents
from mst_ds.preflight.settled_numbers import SettledNumbers
from mst_ds.preflight.trace import Trace, Tracer, join_traces
from mst_ds.sequence_parallel import SequenceGroup
from mst_ds.sequence_parallel.simulated import run_simulated
from mst_ds.structure import Chunkable, MlpStructure, find_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A gradient may be 0 in exact arithmetic, as that of a key's bias without rotary embedding: then it is rounding errors,
# of this part of all gradients together at most.
_NEGLIGIBLE = 1e-6


@dataclass(frozen=True)
class Outcome:
    """One forward and backward of a model, over all its ranks.

    gradients: by parameter name, zero where there is none.
    cross_entropy: the loss without a router's part; trace: what the modules computed. Both None where not asked for.
    """

    loss: Tensor
    gradients: Mapping[str, Tensor]
    cross_entropy: Tensor | None = None
    trace: Trace | None = None

    def loss_error(self, reference: Outcome) -> float:
        """The relative difference of the losses."""
        return relative_error(self.loss, reference.loss)

    def gradient_errors(self, reference: Outcome) -> dict[str, float]:
        """For each parameter the relative error (Frobenius norm) of its gradient."""
        total = torch.stack([gradient.norm() for gradient in reference.gradients.values()]).norm()
        return {
            name: relative_error(self.gradients[name], expected, _NEGLIGIBLE * float(total))
            for name, expected in reference.gradients.items()
        }


def run_plain(model: PreTrainedModel, documents: Documents, *, traced: bool = False) -> Outcome:
    """The truth: transformers' own forward and loss, whose decoder gets each document by itself, without padding."""
    whole, rows = copy.deepcopy(model), documents.as_rows()
    # Of each document a copy with the same parameters: a module may remember what it has seen.
    shared: list[object] = [*whole.parameters(), whole.config]
    alone = [copy.deepcopy(whole, {id(value): value for value in shared}) for _ in documents.lengths]
    decoder = find_decoder(whole)
    if decoder is not None:  # else no plan can be applied to it
        (name,) = (name for name, module in whole.named_modules() if module is decoder)
        of_documents = [replica.get_submodule(name) for replica in alone]
        forward = functools.partial(_each_alone, inspect.signature(decoder.forward), of_documents, documents.lengths)
        decoder.__dict__["forward"] = forward
    tracers = [Tracer(replica, 1, length) for replica, length in zip(alone, documents.lengths, strict=True) if traced]
    around = Tracer(whole, *rows["input_ids"].shape) if traced else None
    with Float64(), SettledNumbers():
        output = whole(**rows)
        output.loss.backward()
        outcome = Outcome(output.loss.detach(), _gradients([whole]))
        if around is None:
            return outcome
        # Shifted by one, as transformers' own loss does it.
        cross_entropy = torch.nn.functional.cross_entropy(
            output.logits.detach()[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten()
        )
    trace = join_traces([around.trace], documents.tokens_of_rows)
    trace = {**join_traces([tracer.trace for tracer in tracers], lambda values: values[0]), **trace}
    return Outcome(outcome.loss, outcome.gradients, cross_entropy, trace)


def _each_alone(
    signature: inspect.Signature, decoders: Sequence[nn.Module], lengths: Sequence[int], *args: Any, **kwargs: Any
) -> Any:
    """What a decoder gives for documents in the rows of a batch, each computed by a decoder of its own."""
    arguments = dict(zip(signature.parameters, args, strict=False)) | kwargs
    ids, _ = arguments.pop("input_ids"), arguments.pop("attention_mask", None)
    outputs = [
        decoder(input_ids=ids[row : row + 1, :length], **arguments)
        for row, (decoder, length) in enumerate(zip(decoders, lengths, strict=True))
    ]
    merged: dict[str, Any] = {"last_hidden_state": _in_rows(output.last_hidden_state[0] for output in outputs)}
    if outputs[0].get("router_logits") is not None:
        of_layers = zip(*(output.router_logits for output in outputs), strict=True)
        merged["router_logits"] = tuple(_in_rows(of_layer).flatten(0, 1) for of_layer in of_layers)
    return type(outputs[0])(**merged)


def _in_rows(of_documents: Iterable[Tensor]) -> Tensor:
    """(length, C) of each document -> (documents, longest, C)."""
    return pad_sequence(list(of_documents), batch_first=True).contiguous()  # as a decoder's own, which may be viewed


def run_planned(model: PreTrainedModel, documents: Documents, case: Case, *, traced: bool = False) -> Outcome:
    """A copy of the model under a plan, on the batch of a run; with `sp_size` above 1 a copy for each simulated rank.

    Raises:
        Exception: whatever the plan or the patched model raises.
    """
    settings, layout = case.settings, case.token_layout
    # A plan is applied by probing the model with random numbers, whose generator threads share.
    one_at_a_time = threading.Lock()

    def run_rank(group: SequenceGroup | None) -> tuple[PreTrainedModel, Tensor, Tracer | None]:
        replica = copy.deepcopy(model)
        with one_at_a_time:
            without = _linear_layers(find_parts(replica, settings).mlps) if traced else set()
            apply_settings(replica, settings, sequence_group=group)
        length = shard_length(documents.seq_len, settings.sp_size)
        tracer = None
        if traced:
            stream = stream_of(replica)
            tracer = Tracer(replica, documents.batch_size, length, without=without, stream=stream)
        shard = documents.shard(0 if group is None else group.rank, layout)
        with Float64(), SettledNumbers():
            loss = replica(**shard, num_items_in_batch=documents.num_items).loss
            loss.backward()
        return replica, loss.detach(), tracer

    ranks = run_simulated(run_rank, settings.sp_size) if settings.sp_size > 1 else [run_rank(None)]
    loss = torch.stack([loss for _, loss, _ in ranks]).sum()
    gradients = _gradients([replica for replica, _, _ in ranks])
    if not traced:
        return Outcome(loss, gradients)
    traces = [tracer.trace for _, _, tracer in ranks if tracer is not None]
    trace = join_traces(traces, documents.tokens_of_batch, functools.partial(layout.join, dim=1))
    return Outcome(loss, gradients, trace[head_name(model)].scalar, trace)


def _linear_layers(mlps: Iterable[Chunkable]) -> set[nn.Module]:
    """Of chunked MLPs: a plan uses their weights and does not call them, and refuses a hook on them."""
    found: list[Any] = [
        layer for mlp in mlps if isinstance(mlp, MlpStructure) for layer in (mlp.gate, mlp.up, mlp.down)
    ]
    return {layer for layer in found if layer is not None}


def head_name(model: PreTrainedModel) -> str:
    """The name of the LM head."""
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _gradients(replicas: list[PreTrainedModel]) -> dict[str, Tensor]:
    """The sum over ranks, which data-parallel training makes of them."""
    totals: dict[str, Tensor] = {}
    for replica in replicas:
        for name, parameter in replica.named_parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            totals[name] = totals[name] + gradient if name in totals else gradient
    return totals

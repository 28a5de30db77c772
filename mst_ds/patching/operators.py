"""What the chunked modules of a patched model compute in place of their own forwards."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mst_ds.attention import CausalMask
from mst_ds.eager_attention import EagerAttention
from mst_ds.layer_stream import LayerStream, Pass, StreamedLayer
from mst_ds.minisequence import (
    ExpertEnds,
    KeptProjections,
    chunked_log_probs,
    chunked_log_probs_of_head,
    chunked_loss,
    chunked_loss_of_head,
    chunked_tokenwise,
)
from mst_ds.mixers import MASK, Indexer, KeptPicks, MixedSequence
from mst_ds.patching.undo import UNSET, Undo
from mst_ds.sequence_parallel import UlyssesContext
from mst_ds.settings import Settings
from mst_ds.structure import (
    Chunkable,
    ExpertsStructure,
    IndexerStructure,
    LossStructure,
    Mixer,
    MlpStructure,
    NormStructure,
    TokenwiseStructure,
)


def chunk_mlp(mlp: Chunkable, settings: Settings, stream: LayerStream, undo: Undo) -> None:
    if isinstance(mlp, MlpStructure):
        chunked: Callable[..., Tensor] = functools.partial(_mlp_forward, mlp, stream, settings.keep_mlp)
    elif isinstance(mlp, ExpertsStructure):
        chunked = functools.partial(_experts_forward, mlp, stream)
    else:
        chunked = functools.partial(_tokenwise_forward, mlp, stream)
    undo.set_attribute(mlp.module, "forward", functools.partial(chunked, mlp.module.forward, settings.mlp_chunks))


def chunk_norm(norm: NormStructure, stream: LayerStream, undo: Undo) -> None:
    undo.set_attribute(norm.module, "forward", functools.partial(_norm_forward, norm, stream, norm.module.forward))


def mix_documents(mixer: Mixer, stream: LayerStream, undo: Undo) -> None:
    original = getattr(mixer.module, mixer.attribute)
    undo.set_attribute(mixer.module, mixer.attribute, functools.partial(_mixer_forward, mixer, stream, original))


def attend_eagerly(attention: EagerAttention, stream: LayerStream, undo: Undo) -> None:
    original = attention.module.forward
    undo.set_attribute(attention.module, "forward", functools.partial(_eager_forward, attention, stream, original))


def pick_in_documents(indexer: IndexerStructure, stream: LayerStream, undo: Undo) -> None:
    """The indexer by documents, on shards; its attention takes a part of a mask for it, which is not there."""
    operator = Indexer(indexer.module.forward, indexer.top_k, indexer.width)
    undo.set_attribute(indexer.module, "forward", functools.partial(_indexer_forward, indexer, operator, stream))
    with_mask = functools.partial(_with_causal_mask, stream, indexer.attention.forward)
    undo.set_attribute(indexer.attention, "forward", with_mask)


def stream_layer(layer: nn.Module, stream: LayerStream, undo: Undo) -> None:
    streamed = StreamedLayer(stream, layer)
    undo.set_attribute(layer, "forward", functools.update_wrapper(streamed, layer.forward))


def chunk_head(loss: LossStructure, settings: Settings, undo: Undo) -> None:
    head = loss.head
    undo.set_attribute(head, "forward", functools.partial(_head_forward, loss, head.forward, settings.loss_chunks))


def mark_as_leaf(module: nn.Module, undo: Undo) -> None:
    """ZeRO-3 gathers its parameters once, before its forward, and not as its submodules are called."""
    from deepspeed.utils import set_z3_leaf_module

    before = dict(module.__dict__)
    set_z3_leaf_module(module, True)
    for name, value in module.__dict__.items():
        if before.get(name, UNSET) is not value:
            undo.changes.append((module, name, before.get(name, UNSET)))


def require_input_gradient(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """DeepSpeed reduces a leaf module's gradients once its inputs have theirs: too early, if these need none."""
    hidden_states, *others = inputs
    if hidden_states.requires_grad or not torch.is_grad_enabled():
        return inputs
    if any(parameter.requires_grad for parameter in module.parameters()):
        hidden_states = hidden_states.detach().requires_grad_()
    return hidden_states, *others


def _mlp_forward(
    mlp: MlpStructure,
    stream: LayerStream,
    keep: bool,
    original: Callable[..., Tensor],
    chunks: int,
    *args: Tensor,
    **kwargs: Tensor,
) -> Tensor:
    (hidden_states,) = _inputs(mlp.module, original, 1, args, kwargs)
    call = stream.call
    if call is None:
        return mlp.run(chunks, hidden_states, keep=keep)
    kept: bool | KeptProjections = False
    if keep and call.is_kept and call.runs_for is not Pass.KEYS:
        part = call.part
        kept = call.note(lambda: KeptProjections(part.keep))
    with call.operator() as skips_output:
        return mlp.run(chunks, hidden_states, keep=kept, sums=call.sums, skips_output=skips_output)


def _experts_forward(
    experts: ExpertsStructure,
    stream: LayerStream,
    original: Callable[..., Tensor],
    chunks: int,
    *args: Tensor,
    **kwargs: Tensor,
) -> Tensor:
    inputs = _inputs(experts.module, original, 3, args, kwargs)
    call = stream.call
    if call is None:
        return experts.run(chunks, *inputs)
    ends = call.note(ExpertEnds) if call.is_kept and call.runs_for is not Pass.KEYS else None
    with call.operator() as skips_output:
        return experts.run(chunks, *inputs, ends=ends, sums=call.sums, skips_output=skips_output)


def _norm_forward(
    norm: NormStructure, stream: LayerStream, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    # With more than the tensor that it was tried with, such as a gate, it may do something else.
    if len(args) != 1 or kwargs:
        return original(*args, **kwargs)
    return norm.run(*args, sums=None if stream.call is None else stream.call.sums)


def _mixer_forward(mixer: Mixer, stream: LayerStream, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if stream.is_paused:
        return original(*args, **kwargs)
    context = _context_of(mixer.module, stream)
    call = stream.call if stream.call is not None and len(stream.call.chunks) > 1 else None
    return mixer.run(MixedSequence(context.group, context.attention.documents, call), *args, **kwargs)


def _eager_forward(
    attention: EagerAttention, stream: LayerStream, original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    if stream.is_paused:
        return original(*args, **kwargs)
    context = _context_of(attention.module, stream)
    return attention.run(original, context, None if stream.call is None else stream.call.tokens, *args, **kwargs)


def _context_of(module: nn.Module, stream: LayerStream) -> UlyssesContext:
    context: UlyssesContext | None = stream.context if stream.call is None else stream.call.context
    if context is None:
        raise ValueError(
            f"{type(module).__name__} runs outside the forward of a patched decoder, where nobody knows its "
            'documents, such as in torch.utils.checkpoint\'s backward: set "recompute" in the "mst" block instead'
        )
    return context


def _indexer_forward(
    indexer: IndexerStructure, operator: Indexer, stream: LayerStream, *args: Any, **kwargs: Any
) -> Tensor:
    if stream.is_paused:
        return operator.forward(*args, **kwargs)
    call = stream.call
    context = _context_of(indexer.module, stream)
    sequence = MixedSequence(context.group, context.attention.documents)
    if call is None or not (call.is_kept and stream.keep_attention):
        return operator(sequence, *args, **kwargs)
    kept = call.note(KeptPicks)
    if call.runs_for is Pass.BACKWARD:
        return kept.take()
    picks = operator(sequence, *args, **kwargs)
    kept.picks = call.part.keep(picks)
    return picks


def _with_causal_mask(stream: LayerStream, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bound = inspect.signature(original).bind(*args, **kwargs)
    if not stream.is_paused and bound.arguments.get(MASK) is None:
        bound.arguments[MASK] = CausalMask()
    return original(*bound.args, **bound.kwargs)


def _tokenwise_forward(
    tokenwise: TokenwiseStructure,
    stream: LayerStream,
    original: Callable[..., Tensor],
    chunks: int,
    *args: Tensor,
    **kwargs: Tensor,
) -> Tensor:
    module = tokenwise.module
    inputs = _inputs(module, original, tokenwise.num_inputs, args, kwargs)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    call = stream.call
    if call is None:
        return chunked_tokenwise(original, inputs, trained, chunks=chunks)
    with call.operator() as skips_output:
        return chunked_tokenwise(original, inputs, trained, chunks=chunks, sums=call.sums, skips_output=skips_output)


def _inputs(
    module: nn.Module, original: Callable[..., Tensor], count: int, args: Sequence[Tensor], kwargs: dict[str, Tensor]
) -> Sequence[Tensor]:
    bound = inspect.signature(original).bind(*args, **kwargs)
    if len(bound.args) != count or bound.kwargs:
        raise ValueError(
            f"{type(module).__name__} is called with arguments with which mst_ds has not seen it work token by token: "
            f"{', '.join(bound.arguments)}"
        )
    return bound.args


def _head_forward(
    loss: LossStructure,
    original: Callable[[Tensor], Tensor],
    chunks: int,
    hidden_states: Tensor,
    labels: Tensor | None = None,
    temperature: float | None = None,
    **arguments: Any,
) -> Tensor:
    """Logits without labels, with them the loss, or with a temperature the labels' log-probabilities."""
    # Inside the head's own call: that is where ZeRO-3 gathers its weight, once, and for a backward that reads it again.
    if labels is None:
        return original(hidden_states)
    arguments |= {"chunks": chunks, "logit_scale": loss.logit_scale, "logit_softcap": loss.logit_softcap}
    of_weight: Callable[..., Tensor] = chunked_loss
    of_head: Callable[..., Tensor] = chunked_loss_of_head
    if temperature is not None:
        of_weight, of_head = chunked_log_probs, chunked_log_probs_of_head
        arguments["temperature"] = temperature
    head: Any = loss.head
    if loss.is_linear:
        return of_weight(hidden_states, head.weight, labels, bias=head.bias, **arguments)
    trained = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return of_head(original, hidden_states, trained, labels, **arguments)

"""Finds out how a model gets from its decoder's last hidden states to its loss."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mst_ds.config import IGNORE_INDEX
from mst_ds.minisequence.router_loss import router_loss
from mst_ds.structure import probe
from mst_ds.structure.layers import decoder_layers
from mst_ds.structure.mlps import is_tokenwise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RouterLoss:
    """What a mixture of experts adds to its loss: coefficient times `mst_ds.minisequence.router_loss`."""

    coefficient: float
    top_k: int


@dataclass(frozen=True)
class LossStructure:
    """A model whose logits are `softcap * tanh(scale * head(hidden_scale * decoder(...)) / softcap)`, or without a
    softcap linear.

    is_linear: the head is a weight and a bias and nothing else, such as an adapter.
    router: None where the model has no router loss, or one that could not be confirmed.
    router_is_on: whether the config asks for it.
    """

    decoder: nn.Module
    head: nn.Module
    is_linear: bool
    hidden_scale: float
    logit_scale: float
    logit_softcap: float | None
    router: RouterLoss | None
    router_is_on: bool

    def head_input(self, hidden_states: Tensor) -> Tensor:
        """What the head gets of the decoder's last hidden states, (B, L, H) both."""
        return hidden_states if self.hidden_scale == 1 else self.hidden_scale * hidden_states

    def logits(self, output: Tensor) -> Tensor:
        """Of the head's output."""
        return _transformed(output, self.logit_scale, self.logit_softcap)


def loss_structure(model: PreTrainedModel) -> LossStructure:
    """Find the parts by running the model's own forward with a stand-in decoder and head of a few elements, in fp64.

    Raises:
        ValueError: the model has no such parts, or does more to its inputs, hidden states, logits or loss.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    name = type(model).__name__
    decoder, head = find_decoder(model), model.get_output_embeddings()
    if decoder is None or head is None:
        raise ValueError(f"{name} is no causal language model with an LM head: mst_ds cannot chunk its loss")
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(f"{name} has a loss_function of its own, which mst_ds cannot chunk: only cross-entropy")
    with probe.isolated_rng():
        is_linear = type(head) is nn.Linear
        hidden_size = model.config.get_text_config().hidden_size
        if probe.is_changed_by_user(head) or not (is_linear or is_tokenwise(head, hidden_size)):
            raise ValueError(f"{name} has an LM head that mst_ds cannot chunk: it has hooks, or mixes tokens")
        hidden_scale = _measure_hidden_scale(model)
        scale, softcap = _measure_logits(model)
        router = _measure_router_loss(model)
        is_on = bool(getattr(model.config, "output_router_logits", False))
        settings = {} if router is None else {"output_router_logits": False}
        if not _is_cross_entropy(model, scale, softcap, **settings):
            router_advice = ": set output_router_logits to false in the model's config" if is_on else ""
            raise ValueError(f"{name} has a loss other than the cross-entropy of each next token{router_advice}")
    return LossStructure(decoder, head, is_linear, hidden_scale, scale, softcap, router, is_on and router is not None)


def find_decoder(model: PreTrainedModel) -> nn.Module | None:
    """The module that the model's own forward calls for its last hidden states; None where it calls none.

    Mostly it is `base_model`. Some models pass that by and call the decoder inside it, and some name none.
    """
    candidates = _possible_decoders(model)
    if len(candidates) < 2 or model.get_output_embeddings() is None:
        return candidates[0] if candidates else None
    with probe.isolated_rng():
        output = probe.random_tensor(probe.ROWS, probe.LENGTH, probe.VOCAB)
        called = (decoder for decoder in candidates if _call(model, output, decoder=decoder).result is not None)
        return next(called, candidates[0])


def _possible_decoders(model: PreTrainedModel) -> list[nn.Module]:
    """`base_model`, and models inside that have all layers, from the outside in."""
    from transformers import PreTrainedModel

    layers = {*decoder_layers(model)}
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]
    found = [module for module in inside if layers and layers.issubset(module.modules())]
    first = [] if model.base_model is model else [model.base_model]
    return list(dict.fromkeys([*first, *found]))


def _measure_hidden_scale(model: PreTrainedModel) -> float:
    """By what the decoder's hidden states are multiplied before the head gets them.

    Raises:
        ValueError: something else is done to them.
    """
    output = probe.random_tensor(probe.ROWS, probe.LENGTH, probe.VOCAB)
    return _call(model, output).hidden_scale


def _measure_logits(model: PreTrainedModel) -> tuple[float, float | None]:
    """Scale and softcap of the logits, read off outputs of the head that are tiny, huge, and between."""
    name = type(model).__name__

    def logits_of(output: Tensor) -> Tensor:
        logits = getattr(_run(model, output), "logits", None)
        if not isinstance(logits, Tensor) or logits.shape != output.shape:
            raise ValueError(
                f"{name} cannot be checked: its forward does not run with another decoder; not supported yet"
            )
        return logits.detach().double()

    # Exact in fp32 too, for models that cast their logits.
    output = probe.random_tensor(probe.ROWS, probe.LENGTH, probe.VOCAB).float().double()
    # So small that a tanh is the identity, so large that it is 1.
    tiny, huge = 2.0**-30, 2.0**40
    ratios = logits_of(tiny * output) / (tiny * output)
    scale = ratios.median().item()
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale  # a division by the softcap and back rounds, in fp32 perhaps
    ceiling = logits_of(huge * output)
    softcap = None if torch.allclose(ceiling, scale * huge * output) else ceiling.abs().median().item()
    for factor in (tiny, 1.0, 100.0, huge):
        expected = _transformed(factor * output, scale, softcap)
        if not torch.allclose(logits_of(factor * output), expected, atol=0.0):
            raise ValueError(
                f"{name} does more to its logits than its LM head, a scale and a softcap: not supported yet"
            )
    return scale, softcap


def _transformed(output: Tensor, scale: float, softcap: float | None) -> Tensor:
    output = output if scale == 1 else scale * output
    return output if softcap is None else softcap * torch.tanh(output / softcap)


def _is_cross_entropy(model: PreTrainedModel, scale: float, softcap: float | None, **kwargs: Any) -> bool:
    """Whether the model's loss and its gradient are those of the logits' cross-entropy with each next token."""
    output = probe.random_tensor(probe.ROWS, probe.LENGTH, probe.VOCAB).requires_grad_()
    labels = torch.randint(probe.VOCAB, (probe.ROWS, probe.LENGTH), device="cpu")
    labels[:, 3:7] = IGNORE_INDEX
    loss = getattr(_run(model, output, labels=labels, **kwargs), "loss", None)
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        return False
    with torch.enable_grad():
        logits = _transformed(output, scale, softcap)[:, :-1]
        expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    (actual_grad,), (expected_grad,) = (torch.autograd.grad(value, output) for value in (loss, expected))
    # transformers computes it in fp32.
    return torch.allclose(loss.double(), expected, rtol=1e-5) and torch.allclose(
        actual_grad, expected_grad, rtol=1e-4, atol=1e-7
    )


def _measure_router_loss(model: PreTrainedModel) -> RouterLoss | None:
    """The router loss under the names that transformers gives its settings, if the model's own loss confirms it."""
    top_k, num_experts = getattr(model, "num_experts_per_tok", None), getattr(model, "num_experts", None)
    coefficient = getattr(model, "router_aux_loss_coef", None)
    if not isinstance(top_k, int) or not isinstance(num_experts, int) or not isinstance(coefficient, (int, float)):
        return None
    router_logits = tuple(probe.random_tensor(probe.TOKENS, num_experts) for _ in range(2))
    mask = torch.ones(probe.ROWS, probe.LENGTH, dtype=torch.long, device="cpu")
    mask[:, -2:] = 0
    output = probe.random_tensor(probe.ROWS, probe.LENGTH, probe.VOCAB)
    labels = torch.randint(probe.VOCAB, mask.shape, device="cpu")
    with_router, without = (
        _run(model, output, router_logits, labels=labels, attention_mask=mask, output_router_logits=flag)
        for flag in (True, False)
    )
    if with_router is None or without is None:
        return None
    expected = router_loss(router_logits, top_k, mask=mask.flatten())
    # transformers computes both in fp32.
    if not torch.allclose((with_router.loss - without.loss).double(), expected.double(), rtol=1e-4):
        return None
    return RouterLoss(float(coefficient), top_k)


@dataclass(frozen=True)
class _Called:
    """What a model gives with stand-ins, None where it fails, and by what it multiplied the hidden states."""

    result: Any
    hidden_scale: float = 1.0


def _run(model: PreTrainedModel, output: Tensor, router_logits: tuple[Tensor, ...] | None = None, **kwargs: Any) -> Any:
    """What the model gives where its head gives `output` (B, L, V) and its routers `router_logits`; None if it fails.

    The weight of a router loss is 1 in it.

    Raises:
        ValueError: the model hands its decoder other tokens than it got, or its head other hidden states.
    """
    return _call(model, output, router_logits, **kwargs).result


def _call(
    model: PreTrainedModel,
    output: Tensor,
    router_logits: tuple[Tensor, ...] | None = None,
    *,
    decoder: nn.Module | None = None,
    **kwargs: Any,
) -> _Called:
    """`_run`; decoder: the one that is replaced, None for the model's."""
    decoder = find_decoder(model) if decoder is None else decoder
    if decoder is None:
        return _Called(None)
    name, stand_in, head = type(model).__name__, _StandInDecoder(router_logits), _StandInHead(output)
    # Some models scale their logits by a number of their decoder.
    stand_in.__dict__ |= {key: value for key, value in decoder.__dict__.items() if type(value) in (int, float)}
    probed = _with_parts(model, {decoder: stand_in, model.get_output_embeddings(): head})
    if probed is None:
        return _Called(None)
    config = copy.deepcopy(model.config)
    config.vocab_size = config.get_text_config().vocab_size = probe.VOCAB
    probed.__dict__ |= {"config": config, "vocab_size": probe.VOCAB, "router_aux_loss_coef": 1.0}
    ids = torch.randint(probe.VOCAB, output.shape[:-1], device="cpu")
    with torch.enable_grad():
        result = probe.attempt(functools.partial(type(probed).forward, probed), ids, **kwargs)
    if result is None:
        return _Called(None)
    if not any(given is ids for given in stand_in.given):
        raise ValueError(f"{name} changes its input before its decoder: not supported yet")
    scale = head.scale_of(stand_in.hidden_states)
    if scale is None:
        raise ValueError(f"{name} changes its decoder's hidden states before its LM head: not supported yet")
    return _Called(result, scale)


def _with_parts(module: nn.Module, stand_ins: dict[nn.Module, nn.Module]) -> nn.Module | None:
    """A shallow copy with modules replaced, and all that lie around them; None where one of them is not there."""
    children: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if child in stand_ins:
            children[name] = stand_ins[child]
        elif inside := {part: stand_in for part, stand_in in stand_ins.items() if part in child.modules()}:
            replaced = _with_parts(child, inside)
            assert replaced is not None
            children[name] = replaced
    found = [part for part in stand_ins if any(part in child.modules() for child in module.children())]
    return probe.with_stand_ins(module, children) if len(found) == len(stand_ins) else None


class _StandInDecoder(nn.Module):
    def __init__(self, router_logits: tuple[Tensor, ...] | None) -> None:
        super().__init__()
        self.hidden_states = probe.random_tensor(probe.ROWS, probe.LENGTH, probe.HIDDEN).requires_grad_()
        self.output = _StandInOutput(self.hidden_states, router_logits)
        self.given: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> _StandInOutput:
        self.given += [*args, *kwargs.values()]
        return self.output


class _StandInHead(nn.Linear):
    """Gives the same logits whatever it gets."""

    def __init__(self, output: Tensor) -> None:
        super().__init__(probe.HIDDEN, probe.VOCAB, device="cpu", dtype=torch.float64)
        self.output = output
        self.given: Tensor | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        self.given = hidden_states
        return self.output

    def scale_of(self, hidden_states: Tensor) -> float | None:
        """By what they were multiplied; None where something else was done to them."""
        given = self.given
        if given is None or not given.requires_grad or given.shape != hidden_states.shape:
            return None
        if torch.equal(given, hidden_states):
            return 1.0
        scale = (given / hidden_states).median().item()
        return scale if torch.allclose(given, scale * hidden_states, rtol=1e-12, atol=0.0) else None


class _StandInOutput:
    """What every decoder's output has: hidden states. Whatever else a model reads shows where it enters a loss."""

    def __init__(self, hidden_states: Tensor, router_logits: tuple[Tensor, ...] | None) -> None:
        self.last_hidden_state = hidden_states
        self.router_logits = router_logits

    def __getattr__(self, name: str) -> Tensor:
        return torch.tensor(torch.nan, device="cpu")

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

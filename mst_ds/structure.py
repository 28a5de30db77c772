"""Finds the parts of a decoder that can be chunked, by what they compute and not by what they are called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from mst_ds.minisequence import chunked_mlp

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FULL_ATTENTION = frozenset({"full_attention", "attention"})
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

# A probe's sizes: small, and all different, so that a mixed-up dimension cannot go unnoticed. Tokens enough for two
# chunks, so that what mixes tokens cannot either.
_HIDDEN, _INTERMEDIATE, _VOCAB, _TOKENS = 6, 10, 14, 9


@dataclass(frozen=True)
class MlpStructure:
    """A module that computes `down(activation(gate(x)) * up(x))`, or without a gate `down(activation(up(x)))`."""

    module: nn.Module
    gate: nn.Linear | None
    up: nn.Linear
    down: nn.Linear
    activation: Callable[[Tensor], Tensor]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that transformers itself treats as the unit of recompute."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def find_mlps(model: PreTrainedModel, *, required: bool) -> list[MlpStructure]:
    """The MLP of every decoder layer.

    Each candidate is checked by running its own forward on stand-ins of a few elements against the chunked operator, in
    fp64: what merely looks like an MLP is not taken for one. Weights are not read, so ZeRO-3 need not gather them.

    Args:
        required: raise where a decoder layer has no such MLP; otherwise the model's MLPs are then left as they are.

    Raises:
        ValueError: `required`, and a layer without an MLP of this structure.
    """
    found = []
    names = {module: name for name, module in model.named_modules()}
    for layer in decoder_layers(model):
        mlp = next((mlp for child in layer.children() if (mlp := _as_mlp(child)) is not None), None)
        if mlp is not None:
            found.append(mlp)
        elif required:
            raise ValueError(
                f"{type(model).__name__}: {names[layer]} has no MLP that can be chunked exactly (two or three linear "
                'layers and an activation); set "mlp_chunks": 1 in the "mst" block to train it with its own MLP'
            )
        else:
            return []
    if required and not found:
        raise ValueError(
            f'{type(model).__name__} has no decoder layers with an MLP; set "mlp_chunks": 1 in the "mst" block'
        )
    return found


def loss_structure(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    """The decoder and the LM head of a model whose logits are `head(decoder(...).last_hidden_state)` and nothing else.

    Raises:
        ValueError: the model has no such parts, or does more to its logits, such as scaling or softcapping.
    """
    from transformers.loss.loss_utils import ForCausalLMLoss

    decoder, head = model.base_model, model.get_output_embeddings()
    name = type(model).__name__
    if decoder is model or not _is_plain_linear(head):
        raise ValueError(f"{name} is no causal language model with a linear LM head: mst_ds cannot chunk its loss")
    if getattr(model.config, "output_router_logits", False):
        raise ValueError(
            f"{name} adds a router loss to its loss, which mst_ds does not yet: "
            "set output_router_logits to false in the model's config"
        )
    if model.loss_function is not ForCausalLMLoss:
        raise ValueError(f"{name} has a loss_function of its own, which mst_ds cannot chunk: only cross-entropy")
    plain = _logits_are_plain(model, decoder, head)
    if plain is None:
        raise ValueError(f"{name} cannot be checked: its forward does not run with another decoder; not supported yet")
    if not plain:
        raise ValueError(f"{name} does more to its logits than its LM head (scaling, softcapping): not supported yet")
    return decoder, head


def _is_plain_linear(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether its weight and bias are all that counts: a chunked operator reads them without calling the module."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks)


def require_shardable(model: PreTrainedModel) -> None:
    """Refuse what is not exact on a shard: tokens may meet in causal attention over all positions, nowhere else.

    Raises:
        ValueError: a sliding window, attention that is not causal, layers that mix tokens in another way, or rotary
            frequencies that depend on the length, of which a shard sees only its part.
    """
    config = model.config.get_text_config()
    types = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    rope_types = {str(entry.get("rope_type")) for entry in ropes}
    window = getattr(config, "sliding_window", None)
    reasons = {
        f"sliding_window {window}": window is not None and getattr(config, "use_sliding_window", True),
        f"layers of type {', '.join(sorted(types - _FULL_ATTENTION))}": bool(types - _FULL_ATTENTION),
        "convolutions over the sequence": any(isinstance(module, nn.Conv1d) for module in model.modules()),
        "attention that is not causal": getattr(config, "is_causal", True) is False
        or bool(getattr(config, "use_bidirectional_attention", False)),
        f"rope_type {', '.join(sorted(rope_types & _LENGTH_DEPENDENT_ROPE))}": bool(
            rope_types & _LENGTH_DEPENDENT_ROPE
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"{type(model).__name__} has {reason}, which sequence parallelism does not support yet: "
                "use sp_size 1 for this model"
            )


def _as_mlp(module: nn.Module) -> MlpStructure | None:
    if "forward" in module.__dict__:
        return None
    linears = [(name, child) for name, child in module.named_children() if _is_plain_linear(child)]
    others = [child for _, child in module.named_children() if not _is_plain_linear(child)]
    activations = [child for child in others if not any(True for _ in child.parameters())]
    if len(linears) not in (2, 3) or len(activations) != 1 or len(others) != 1:
        return None
    for names in permutations([name for name, _ in linears]):
        roles = dict(zip(("gate", "up", "down") if len(names) == 3 else ("up", "down"), names, strict=True))
        if _computes_mlp(module, roles, activations[0]):
            parts = {role: getattr(module, name) for role, name in roles.items()}
            return MlpStructure(module, parts.get("gate"), parts["up"], parts["down"], activations[0])
    return None


def _computes_mlp(module: nn.Module, roles: dict[str, str], activation: nn.Module) -> bool:
    with _isolated_rng():
        stand_ins = {}
        for role, name in roles.items():
            sizes = (_INTERMEDIATE, _HIDDEN) if role == "down" else (_HIDDEN, _INTERMEDIATE)
            bias = getattr(module, name).bias is not None
            stand_ins[name] = nn.Linear(*sizes, bias=bias, device="cpu", dtype=torch.float64)
        x = torch.randn(1, _TOKENS, _HIDDEN, dtype=torch.float64, device="cpu")
        part = {role: stand_ins[name] for role, name in roles.items()}
        gate = part.get("gate")
        expected = chunked_mlp(
            x,
            gate.weight if gate is not None else None,
            part["up"].weight,
            part["down"].weight,
            chunks=2,
            activation=activation,
            gate_bias=gate.bias if gate is not None else None,
            up_bias=part["up"].bias,
            down_bias=part["down"].bias,
        )
        actual = _run_probe(module, stand_ins, x)
    return isinstance(actual, Tensor) and actual.shape == expected.shape and torch.allclose(actual, expected)


class _StandInDecoder(nn.Module):
    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *args: Any, **kwargs: Any) -> _StandInOutput:
        return _StandInOutput(self.hidden_states)


class _StandInOutput:
    """What every decoder's output has, whatever else it may have: hidden states, and None for the rest."""

    def __init__(self, hidden_states: Tensor) -> None:
        self.last_hidden_state = hidden_states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]


def _logits_are_plain(model: PreTrainedModel, decoder: nn.Module, head: nn.Linear) -> bool | None:
    """Whether the model's logits are its head's output; None where that cannot be found out."""
    with _isolated_rng():
        hidden_states = torch.randn(1, _TOKENS, _HIDDEN, dtype=torch.float64, device="cpu")
        # Far from 0, where a softcap is visible.
        stand_in_head = nn.Linear(_HIDDEN, _VOCAB, bias=head.bias is not None, device="cpu", dtype=torch.float64)
        stand_in_head.requires_grad_(False).weight.mul_(100)
        stand_ins = {decoder: _StandInDecoder(hidden_states), head: stand_in_head}
        named = {name: stand_ins[child] for name, child in model.named_children() if child in stand_ins}
        output = _run_probe(model, named, torch.zeros(1, _TOKENS, dtype=torch.long, device="cpu"))
    logits = getattr(output, "logits", None)
    if len(named) != len(stand_ins) or not isinstance(logits, Tensor):
        return None
    return torch.allclose(logits, stand_in_head(hidden_states))


def _run_probe(module: nn.Module, stand_ins: Mapping[str, nn.Module], x: Tensor) -> Any:
    """Run the forward of `module`'s class with some of its children replaced; None where that does not work."""
    probe = copy.copy(module)
    probe.__dict__["_modules"] = {**module._modules, **stand_ins}
    # As in training: an MLP with dropout must not pass for one without.
    probe.__dict__["training"] = True
    try:
        with torch.no_grad():
            return type(module).forward(probe, x)
    except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        return None


def _isolated_rng() -> Any:
    return torch.random.fork_rng(devices=[])

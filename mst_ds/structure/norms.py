"""Finds the norms of a model, which can be chunked by tokens."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from mst_ds.minisequence import ParameterSums, chunked_rms_norm, chunked_tokenwise, chunks_in_cache
from mst_ds.structure import probe
from mst_ds.structure.mlps import is_tokenwise

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RMSNormStructure:
    """A module that computes `x / sqrt(mean(x^2) + epsilon) * (weight + offset)`.

    keeps_dtype: whether its output has the dtype of input and weight where these are of one, of 16 bits.
    """

    module: nn.Module
    weight: str
    epsilon: float
    offset: float
    keeps_dtype: bool

    def run(self, hidden_states: Tensor, *, sums: ParameterSums | None = None) -> Tensor:
        """The module's output, computed by the chunked operator."""
        forward = functools.partial(type(self.module).forward, self.module)
        return chunked_rms_norm(
            hidden_states,
            getattr(self.module, self.weight),
            function=forward,
            epsilon=self.epsilon,
            offset=self.offset,
            keeps_dtype=self.keeps_dtype,
            chunks=chunks_in_cache(hidden_states),
            sums=sums,
        )

    def formula(self, hidden_states: Tensor) -> Tensor:
        """The same in plain torch: what a module has to compute to be one."""
        factor = (hidden_states.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        weight: Tensor = getattr(self.module, self.weight)
        return hidden_states * factor * (weight + self.offset)


@dataclass(frozen=True)
class OtherNormStructure:
    """Another module with vectors for weights, such as a LayerNorm, that works token by token."""

    module: nn.Module

    def run(self, hidden_states: Tensor, *, sums: ParameterSums | None = None) -> Tensor:
        """The module's output, computed in chunks."""
        forward = functools.partial(type(self.module).forward, self.module)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        return chunked_tokenwise(forward, [hidden_states], trained, chunks=chunks_in_cache(hidden_states), sums=sums)


NormStructure: TypeAlias = RMSNormStructure | OtherNormStructure


# What a module's own settings are; tensors and objects may differ where these do not.
_PLAIN = (bool, int, float, str, tuple, type(None))
# Small tokens, for which epsilon matters, and large ones, which a clamp would change.
_SCALES = (1e-3, 1.0, 1e3)


def find_norms(model: PreTrainedModel) -> list[NormStructure]:
    """The modules that have vectors for weights and nothing else, and work token by token: norms.

    Each kind is checked once by running its own forward on a stand-in of a few elements, in fp64.
    """
    kinds: dict[Any, NormStructure | None] = {}
    found: list[NormStructure] = []
    with probe.isolated_rng():
        for module in model.modules():
            widths = {probe.shape_of(parameter) for parameter in module.parameters()}
            has_more = [*module.children(), *module.buffers()]
            if has_more or len(widths) != 1 or probe.is_changed_by_user(module):
                continue
            (shape,) = widths
            if len(shape) != 1 or shape[0] == 1:
                continue
            settings = [(name, value) for name, value in module.__dict__.items() if isinstance(value, _PLAIN)]
            kind = (type(module), shape, *sorted(settings, key=str), *(name for name, _ in module.named_parameters()))
            if kind not in kinds:
                kinds[kind] = _norm_like(module, shape[0])
            like = kinds[kind]
            if isinstance(like, RMSNormStructure):
                found.append(replace(like, module=module))
            elif like is not None:
                found.append(OtherNormStructure(module))
    return found


def _norm_like(module: nn.Module, width: int) -> NormStructure | None:
    if not is_tokenwise(module, width):
        return None
    names = [name for name, _ in module.named_parameters()]
    epsilons = [value for value in module.__dict__.values() if isinstance(value, float)]
    small, hidden = next(iter(probe.miniatures(module, width)))
    tokens = probe.small_and_large_tokens(probe.ROWS, probe.LENGTH, hidden)
    forward = functools.partial(type(small).forward, small)
    for epsilon in epsilons if len(names) == 1 else []:
        for offset in (0.0, 1.0):
            candidate = RMSNormStructure(small, names[0], epsilon, offset, keeps_dtype=_keeps_dtype(small, tokens))
            # A norm computes in fp32, whatever it is given.
            if all(
                probe.is_same(candidate.formula, forward, [tokens * scale], list(small.parameters()), tolerance=1e-5)
                for scale in _SCALES
            ):
                return candidate
    return OtherNormStructure(module)


def _keeps_dtype(small: nn.Module, tokens: Tensor) -> bool:
    narrow = copy.deepcopy(small).bfloat16()
    output = probe.attempt(functools.partial(type(small).forward, narrow), tokens.bfloat16())
    return isinstance(output, Tensor) and output.dtype == torch.bfloat16

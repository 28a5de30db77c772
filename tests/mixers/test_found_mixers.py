"""Which modules are mixers: of a forward that does more than is known, or that was wrapped, nothing may get lost."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mst_ds.attention import Documents
from mst_ds.mixers import MixedSequence
from mst_ds.structure.mixers import MixerStructure, is_mixer


def causal_conv1d_fn(hidden_states: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
    windows = torch.nn.functional.pad(hidden_states, (1, 0)).unfold(2, 2, 1)
    return (windows * weight[:, None]).sum(dim=3)


class OwnScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.cumsum(dim=2)


class Convolves(nn.Module):
    def forward(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        return causal_conv1d_fn(hidden_states, weight)


class ConvolvesInAGenerator(nn.Module):
    def forward(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([causal_conv1d_fn(part, weight) for part in (hidden_states, 2 * hidden_states)])


class ScansToo(nn.Module):
    def forward(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        return OwnScan.apply(causal_conv1d_fn(hidden_states, weight))


class ScansInAGenerator(nn.Module):
    def forward(self, hidden_states: Tensor, weight: Tensor) -> Tensor:
        parts = [OwnScan.apply(part) for part in hidden_states.split(1)]
        return causal_conv1d_fn(torch.cat(parts), weight)


def doubled(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(*args: Any) -> Tensor:
        return 2 * forward(*args)

    return wrapper


class Wrapped(nn.Module):
    forward = doubled(Convolves.forward)


@pytest.mark.parametrize("module_class", [ScansToo, ScansInAGenerator, Wrapped])
def test_what_would_get_lost_is_no_mixer(module_class: type[nn.Module]) -> None:
    assert not is_mixer(module_class())


@pytest.mark.parametrize("module_class", [Convolves, ConvolvesInAGenerator])
def test_every_call_of_a_forward_ends_with_a_document(module_class: type[nn.Module]) -> None:
    module = module_class()
    assert is_mixer(module)
    hidden_states, weight = torch.rand(1, 2, 5), torch.ones(2, 2)
    packed = MixerStructure(module).run(MixedSequence(None, Documents([[0, 2]])), hidden_states, weight)
    alone = [module(part, weight) for part in hidden_states.split([2, 3], dim=2)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=-1))

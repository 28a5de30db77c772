"""Which modules are mixers: of a forward that does more than is known, or that was wrapped, nothing may get lost."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from mst_ds.attention import Documents
from mst_ds.mixers import MixedSequence
from mst_ds.structure import find_mixers
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
    packed = MixerStructure(module, carries=True).run(MixedSequence(None, Documents([[0, 2]])), hidden_states, weight)
    alone = [module(part, weight) for part in hidden_states.split([2, 3], dim=2)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=-1))


class WithoutDecay(MiniMaxLightningAttention):
    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        queries, keys, values = self.act_fn(self.qkv_proj(hidden_states)).chunk(3, dim=-1)
        mixed = torch.tril(queries @ keys.transpose(1, 2)) @ values
        gate = torch.sigmoid(self.output_gate(hidden_states))
        return self.out_proj(gate * self.norm(mixed)), None


@pytest.mark.parametrize(("module_class", "is_found"), [(MiniMaxLightningAttention, True), (WithoutDecay, False)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lightning_attention_is_found_by_what_it_computes(module_class: Any, is_found: bool, device: str) -> None:
    config = MiniMaxConfig(hidden_size=12, num_attention_heads=2, num_hidden_layers=2, block_size=4)
    with torch.device(device):
        assert is_mixer(module_class(config, 1)) is is_found


class OwnCell(nn.Module):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.cumsum(dim=2)


class Recurrent(nn.Module):
    """A convolution of a module of its own, and what comes after it."""

    def __init__(self, cell: nn.Module, padding: int = 2) -> None:
        super().__init__()
        self.conv, self.cell = nn.Conv1d(4, 4, 3, groups=4, padding=padding, dtype=torch.float64), cell

    def forward(self, hidden_states: Tensor) -> Tensor:
        convolved = self.conv(hidden_states)[..., : hidden_states.shape[2]]
        return self.cell(convolved)


@pytest.mark.parametrize(
    "module", [Recurrent(OwnCell()), Recurrent(nn.Tanh(), padding=1)], ids=["unknown cell", "sees later tokens"]
)
def test_a_convolution_beside_what_is_not_known_is_no_mixer(module: nn.Module) -> None:
    assert not is_mixer(module)


def test_a_convolution_that_is_a_module_ends_with_a_document() -> None:
    module = Recurrent(nn.Tanh())
    (mixer,) = find_mixers(module)  # type: ignore[arg-type]
    assert mixer.module is module.conv
    hidden_states = torch.rand(1, 4, 7, dtype=torch.float64)
    packed = mixer.run(MixedSequence(None, Documents([[0, 3]])), hidden_states)
    alone = [module.conv(part)[..., : part.shape[2]] for part in hidden_states.split([3, 4], dim=2)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=2))

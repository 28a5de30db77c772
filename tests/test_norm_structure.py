"""Norms are found by what they compute: the RMSNorms of all models, and nothing that only looks like one."""

import copy
from collections import Counter

import pytest
import torch
from plain_model import assert_close, loss_and_gradients, make_batch
from tiny import tiny_settings
from tiny_models import tiny_model
from torch import nn

from mst_ds import apply_settings
from mst_ds.structure.norms import OtherNormStructure, RMSNormStructure, find_norms

WIDTH = 32  # the hidden size of the tiny models
# By the end of a norm's name, how many there are in two layers; and what the weight is counted from.
LAYER_NORMS = {"input_layernorm": 2, "post_attention_layernorm": 2, "norm": 1}
HEAD_NORMS = {"q_norm": 2, "k_norm": 2}
AROUND_NORMS = {"pre_feedforward_layernorm": 2, "post_feedforward_layernorm": 2}
RMS_NORMS = {
    "llama": (LAYER_NORMS, 0.0),
    "gemma": (LAYER_NORMS, 1.0),
    "gemma2": (LAYER_NORMS | AROUND_NORMS, 1.0),
    "qwen3": (LAYER_NORMS | HEAD_NORMS, 0.0),
    "gpt-oss": (LAYER_NORMS, 0.0),
    "deepseek-v3": (LAYER_NORMS | {"q_a_layernorm": 2, "kv_a_layernorm": 2}, 0.0),
}


def found_by_name(model):
    names = {module: name for name, module in model.named_modules()}
    return {names[norm.module]: norm for norm in find_norms(model)}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norms_are_found(name, device):
    expected, offset = RMS_NORMS[name]
    model = tiny_model(name).to(device)
    found = found_by_name(model)
    assert Counter(path.rsplit(".", 1)[-1] for path in found) == expected
    epsilon = model.config.rms_norm_eps
    for path, norm in found.items():
        assert isinstance(norm, RMSNormStructure), path
        # DeepSeek's have an epsilon of their own beside the config's.
        assert norm.epsilon == (1e-6 if "_a_" in path else epsilon), path
        assert (norm.weight, norm.offset) == ("weight", offset), path
        assert norm.keeps_dtype, path


@pytest.mark.parametrize(("name", "count"), [("gpt2", 5), ("phi", 3), ("starcoder2", 5), ("cohere", 3)])
def test_layer_norms_are_found_as_other_norms(name, count):
    found = find_norms(tiny_model(name))
    assert len(found) == count
    assert all(isinstance(norm, OtherNormStructure) for norm in found)


def test_norms_with_other_epsilons_are_told_apart():
    model = tiny_model("llama")
    for index, layer in enumerate(model.model.layers):
        layer.input_layernorm.variance_epsilon = 10.0 ** (-index - 2)
    found = found_by_name(model)
    assert [found[f"model.layers.{index}.input_layernorm"].epsilon for index in range(2)] == [1e-2, 1e-3]


def test_looking_changes_nothing():
    model = tiny_model("llama")
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    find_norms(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Norm(nn.Module):
    """An RMSNorm, of which the classes below each change one thing."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
        self.epsilon = 1e-4

    def before(self, x):
        return x

    def factor(self, x):
        return (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()

    def scale(self):
        return self.weight

    def after(self, x):
        return x

    def forward(self, x):
        x = self.before(x)
        return self.after(x * self.factor(x) * self.scale())


class MinusTheMean(Norm):
    def before(self, x):
        return x - x.mean(-1, keepdim=True)


class ClampedBefore(Norm):
    def before(self, x):
        return x.clamp(-1, 1)


class ClampedAfter(Norm):
    def after(self, x):
        return x.clamp(-1.5, 1.5)


class AnotherEpsilon(Norm):
    def factor(self, x):
        return (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class EpsilonOutsideTheRoot(Norm):
    def factor(self, x):
        return 1 / (x.square().mean(-1, keepdim=True).sqrt() + self.epsilon)


class EpsilonAsTheLeast(Norm):
    def factor(self, x):
        return x.square().mean(-1, keepdim=True).clamp_min(self.epsilon).rsqrt()


class SumForMean(Norm):
    def factor(self, x):
        return (x.square().sum(-1, keepdim=True) + self.epsilon).rsqrt()


class MeanOfAHalf(Norm):
    def factor(self, x):
        return (x[..., : x.shape[-1] // 2].square().mean(-1, keepdim=True) + self.epsilon).rsqrt()


class MeanOfMagnitudes(Norm):
    def factor(self, x):
        return 1 / (x.abs().mean(-1, keepdim=True) + self.epsilon)


class FactorWithoutGradient(Norm):
    def factor(self, x):
        return super().factor(x).detach()


class WeightWithoutGradient(Norm):
    def scale(self):
        return self.weight.detach()


class WeightFromMinusOne(Norm):
    def scale(self):
        return self.weight - 1


class TwiceTheWeight(Norm):
    def scale(self):
        return 2 * self.weight


class MagnitudeOfTheWeight(Norm):
    def scale(self):
        return self.weight.abs()


class WithResidual(Norm):
    def forward(self, x):
        return x + super().forward(x)


class InFp32(Norm):
    """Whose output has another dtype than a fused kernel's; yet it is one."""

    def before(self, x):
        return x.to(torch.promote_types(x.dtype, torch.float32))


class OverTheLength(Norm):
    def factor(self, x):
        return (x.square().mean(1, keepdim=True) + self.epsilon).rsqrt()


LOOKALIKES = [
    MinusTheMean,
    ClampedBefore,
    ClampedAfter,
    AnotherEpsilon,
    EpsilonOutsideTheRoot,
    EpsilonAsTheLeast,
    SumForMean,
    MeanOfAHalf,
    MeanOfMagnitudes,
    FactorWithoutGradient,
    WeightWithoutGradient,
    WeightFromMinusOne,
    TwiceTheWeight,
    MagnitudeOfTheWeight,
    WithResidual,
    OverTheLength,
]


def llama_with(norm):
    model = tiny_model("llama")
    model.model.layers[1].input_layernorm = norm
    return model


def structure_of(norm):
    return found_by_name(llama_with(norm)).get("model.layers.1.input_layernorm")


def assert_exact(model):
    batch = make_batch(30)
    expected = loss_and_gradients(model, **batch)
    assert_close(
        loss_and_gradients(apply_settings(copy.deepcopy(model), tiny_settings(keep_attention=True)), **batch), expected
    )


def test_an_rms_norm_of_another_class_is_one():
    structure = structure_of(Norm())
    assert isinstance(structure, RMSNormStructure)
    assert (structure.weight, structure.epsilon, structure.offset) == ("weight", 1e-4, 0.0)
    assert structure.keeps_dtype
    assert not structure_of(InFp32()).keeps_dtype
    assert_exact(llama_with(Norm()))


@pytest.mark.parametrize("make", LOOKALIKES)
def test_a_lookalike_is_no_rms_norm_and_exact(make):
    assert not isinstance(structure_of(make()), RMSNormStructure)
    assert_exact(llama_with(make()))


def test_what_mixes_tokens_is_no_norm():
    assert structure_of(OverTheLength()) is None

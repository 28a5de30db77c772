"""What looks like an MLP: taken for what it computes, or not at all; and what is taken trains exactly."""

import pytest
import torch
from lookalike_experts import (
    Experts,
    ExpertsThatDropTheLast,
    ExpertsWithCapacity,
    ExpertsWithClamp,
    ExpertsWithDropout,
    ExpertsWithFixedCapacity,
    ExpertsWithScale,
    MixtureOfExperts,
    MlpExperts,
    OtherExperts,
)
from lookalikes import DROPOUTS, MIXING, TOKENWISE, Mlp, UpBeforeGate, WithOptionalArgument
from plain_model import assert_close, loss_and_gradients, make_batch
from tiny import tiny_settings
from tiny_models import tiny_model
from torch import nn

from mst_ds import apply_settings, remove_plan
from mst_ds.structure import ExpertsStructure, MlpStructure, TokenwiseStructure, find_mlps, probe


def llama_with(mlp):
    model = tiny_model("llama")
    model.model.layers[1].mlp = mlp.double()
    return model


def seeded(model, seed=0):
    torch.manual_seed(seed)
    return loss_and_gradients(model, **make_batch())


def assert_exact(model):
    plain = seeded(model)
    for recompute in (False, True):
        apply_settings(model, tiny_settings(recompute=recompute))
        assert_close(seeded(model), plain)
        remove_plan(model)


@pytest.mark.parametrize("bias", [True, False])
def test_roles_come_from_what_is_computed_not_from_names_or_order(bias):
    mlp = Mlp(nn.GELU(), bias=bias)
    found = find_mlps(llama_with(mlp), required=True)[1]
    assert isinstance(found, MlpStructure)
    assert found.module is mlp
    assert (found.gate, found.up, found.down) == (mlp.a, mlp.b, mlp.c)
    assert found.activation is mlp.act


@pytest.mark.parametrize("make", TOKENWISE.values(), ids=TOKENWISE)
def test_what_works_token_by_token_is_chunked_as_such_and_exact(make):
    mlp = make()
    model = llama_with(mlp)
    found = find_mlps(model, required=True)[1]
    assert isinstance(found, TokenwiseStructure)
    assert found.module is mlp
    assert_exact(model)


@pytest.mark.parametrize("make", DROPOUTS.values(), ids=DROPOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_an_mlp_with_dropout_is_chunked_in_either_mode(make, training):
    model = llama_with(make()).train(training)
    assert isinstance(find_mlps(model, required=True)[1], TokenwiseStructure)
    if not training:
        assert_exact(model)


@pytest.mark.parametrize("make", DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_draws_the_same_mask_in_the_recompute(make):
    """With one plan and one seed the gradients are the same with and without recompute of the layer."""
    results = []
    for recompute in (False, True):
        model = apply_settings(llama_with(make()), tiny_settings(recompute=recompute))
        results.append(seeded(model, seed=7))
        another = seeded(model, seed=8)
    assert_close(results[1], results[0])
    assert abs(another["loss"] - results[1]["loss"]) > 1e-4
    # A gradient by another mask than the loss's would show against a difference quotient.
    assert_is_derivative(apply_settings(llama_with(make()), tiny_settings(recompute=True)))


def assert_is_derivative(model):
    grads = seeded(model, seed=7)
    weight, step = model.model.layers[1].mlp.b.weight, 1e-3
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    losses = []
    for position in (step, -2 * step):
        with torch.no_grad():
            weight += position * direction
        losses.append(seeded(model, seed=7)["loss"])
    quotient = (losses[0] - losses[1]) / (2 * step)
    # The norms' fp32 and the second derivative leave three digits.
    assert quotient.item() == pytest.approx((grads["model.layers.1.mlp.b.weight"] * direction).sum().item(), rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("make", MIXING.values(), ids=MIXING)
def test_what_mixes_tokens_or_cannot_be_told_is_not_taken(make):
    model = llama_with(make())
    with pytest.raises(ValueError, match=r'LlamaForCausalLM: model.layers.1 has no MLP .* set "mlp_chunks": 1 in'):
        find_mlps(model, required=True)
    # All or none: a model that is chunked in part would not keep the plan's memory.
    assert find_mlps(model, required=False) == []


def test_the_answer_does_not_depend_on_luck(monkeypatch):
    """What shows in few tokens, or seldom; and what must not be refused for a rounding."""
    seldom = [MIXING[name] for name in ("layer drop", "a token far before", "scaled by the largest")]
    for seed in range(4):
        monkeypatch.setattr(probe, "_SEED", seed)
        assert find_mlps(llama_with(TOKENWISE["product in fp32"]()), required=True)
        for make in (*seldom, lambda: MixtureOfExperts(ExpertsWithCapacity())):
            assert find_mlps(llama_with(make()), required=False) == []


def test_an_argument_that_was_not_seen_is_refused():
    mlp = WithOptionalArgument()
    model = apply_settings(llama_with(mlp), tiny_settings())
    x = torch.randn(1, 9, 32, dtype=torch.float64)
    assert mlp(x).shape == x.shape
    for arguments in ({"residual": x}, {"residual": None}):
        with pytest.raises(ValueError, match=r"WithOptionalArgument is called with arguments .*: x, residual"):
            mlp(x, **arguments)
    remove_plan(model)
    assert mlp(x, residual=x).shape == x.shape


EXPERTS = {
    "experts": (Experts, ExpertsStructure),
    "with scale": (ExpertsWithScale, TokenwiseStructure),
    "with clamp": (ExpertsWithClamp, TokenwiseStructure),
    "other names": (OtherExperts, TokenwiseStructure),
}


@pytest.mark.parametrize(("make", "structure"), EXPERTS.values(), ids=EXPERTS)
def test_experts_are_taken_for_what_they_compute_and_exact(make, structure):
    moe = MixtureOfExperts(make())
    model = llama_with(moe)
    found = find_mlps(model, required=True)
    assert [type(mlp) for mlp in found] == [MlpStructure, structure]
    assert found[1].module is moe.experts  # the router is left alone
    assert_exact(model)


def test_experts_that_are_mlps_are_chunked_with_their_router():
    model = llama_with(MlpExperts())
    assert isinstance(find_mlps(model, required=True)[1], TokenwiseStructure)
    assert_exact(model)


def test_experts_with_dropout_draw_the_same_mask_in_the_recompute():
    results = []
    for recompute in (False, True):
        model = llama_with(MixtureOfExperts(ExpertsWithDropout()))
        assert isinstance(find_mlps(model, required=True)[1], TokenwiseStructure)
        results.append(seeded(apply_settings(model, tiny_settings(recompute=recompute)), seed=7))
    assert_close(results[1], results[0])


@pytest.mark.parametrize("make", [ExpertsWithCapacity, ExpertsWithFixedCapacity, ExpertsThatDropTheLast])
def test_experts_that_drop_tokens_are_not_taken(make):
    model = llama_with(MixtureOfExperts(make()))
    with pytest.raises(ValueError, match=r"model.layers.1 has no MLP that can be chunked exactly"):
        find_mlps(model, required=True)


def test_looking_at_a_batch_norm_does_not_count_a_batch():
    model = llama_with(MIXING["batch norm"]())
    norm = model.model.layers[1].mlp.norm
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    find_mlps(model, required=False)
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


def test_up_before_gate_is_not_taken_for_gate_before_up():
    """Both are two linear layers of these sizes; the operator would give another result."""
    assert not isinstance(find_mlps(llama_with(UpBeforeGate()), required=True)[1], MlpStructure)

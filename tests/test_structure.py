"""What is taken for a chunkable MLP or a plain LM head, and what is not."""

import pytest
import torch
import torch.nn.functional as F
from tiny_models import ARCHITECTURES, NO_DROPOUT, build, tiny_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from mst_ds.structure import decoder_layers, find_mlps, loss_structure

# The names of gate, up and down in each architecture.
GATED = ("gate_proj", "up_proj", "down_proj")
ROLES = dict.fromkeys(ARCHITECTURES, GATED) | {
    "gpt-neox": (None, "dense_h_to_4h", "dense_4h_to_h"),
    "phi": (None, "fc1", "fc2"),
    "starcoder2": (None, "c_fc", "c_proj"),
}


class Mlp(nn.Module):
    """Llama's children under names that say nothing, in an order of their own."""

    def __init__(self, activation=None, bias=True):
        super().__init__()
        self.c = nn.Linear(48, 32, bias=bias)
        self.b = nn.Linear(32, 48)
        self.act = activation or nn.SiLU()
        self.a = nn.Linear(32, 48)

    def forward(self, x):
        return self.c(self.act(self.a(x)) * self.b(x))


class WithResidual(Mlp):
    def forward(self, x):
        return x + super().forward(x)


class WithScale(Mlp):
    def forward(self, x):
        return super().forward(x) * 0.9


class WithDropout(Mlp):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.1, training=self.training)


class ActivationOfTheProduct(Mlp):
    def forward(self, x):
        return self.c(self.act(self.a(x) * self.b(x)))


class WithTwoOutputs(Mlp):
    def forward(self, x):
        return super().forward(x), None


class WithAnotherArgument(Mlp):
    def forward(self, x, residual):
        return super().forward(x) + residual


class WithAnotherParameter(Mlp):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((32,), 2.0))

    def forward(self, x):
        return super().forward(x) * self.scale[: x.shape[-1]]


class OwnLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def with_own_linear():
    mlp = Mlp()
    mlp.a = OwnLinear(32, 48)
    return mlp


def with_forward_of_the_instance():
    mlp = Mlp()
    original = mlp.forward
    mlp.forward = lambda x: 2 * original(x)
    return mlp


def with_forward_of_a_linear():
    mlp = Mlp()
    original = mlp.a.forward
    mlp.a.forward = lambda x: 2 * original(x)
    return mlp


def with_hook():
    mlp = Mlp()
    mlp.a.register_forward_hook(lambda module, args, output: 2 * output)
    return mlp


def with_weight_norm():
    mlp = Mlp()
    # Its weight is computed by a hook of the layer that the operator never calls.
    nn.utils.parametrizations.weight_norm(mlp.a)
    return mlp


LOOKALIKES = {
    "residual": WithResidual,
    "scale": WithScale,
    "dropout": WithDropout,
    "activation of the product": ActivationOfTheProduct,
    "two outputs": WithTwoOutputs,
    "another argument": WithAnotherArgument,
    "another parameter": WithAnotherParameter,
    "activation with parameters": lambda: Mlp(nn.PReLU()),
    "random activation": lambda: Mlp(nn.RReLU()),
    "activation over the tokens": lambda: Mlp(nn.Softmax(dim=-2)),
    "a linear class of its own": with_own_linear,
    "forward of the instance": with_forward_of_the_instance,
    "forward of a linear": with_forward_of_a_linear,
    "hook": with_hook,
    "weight norm": with_weight_norm,
}


def llama_with(mlp):
    model = tiny_model("llama")
    model.model.layers[1].mlp = mlp.double()
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finds_every_layers_mlp_and_the_head(name):
    model = tiny_model(name)
    mlps = find_mlps(model, required=True)
    assert [mlp.module for mlp in mlps] == [layer.mlp for layer in decoder_layers(model)]
    assert len(mlps) == 2
    for mlp in mlps:
        expected = tuple(getattr(mlp.module, role) if role else None for role in ROLES[name])
        assert all(found is child for found, child in zip((mlp.gate, mlp.up, mlp.down), expected, strict=True))
    decoder, head = loss_structure(model)
    assert decoder is model.base_model
    assert head is model.get_output_embeddings()


@pytest.mark.parametrize("bias", [True, False])
def test_roles_come_from_what_is_computed_not_from_names_or_order(bias):
    mlp = Mlp(nn.GELU(), bias=bias)
    found = find_mlps(llama_with(mlp), required=True)[1]
    assert found.module is mlp
    assert (found.gate, found.up, found.down) == (mlp.a, mlp.b, mlp.c)
    assert found.activation is mlp.act


@pytest.mark.parametrize("make", LOOKALIKES.values(), ids=LOOKALIKES)
def test_a_lookalike_is_not_taken(make):
    model = llama_with(make())
    with pytest.raises(ValueError, match=r'LlamaForCausalLM: model.layers.1 has no MLP .* set "mlp_chunks": 1 in'):
        find_mlps(model, required=True)
    # All or none: a model that is chunked in part would not keep the plan's memory.
    assert find_mlps(model, required=False) == []


@pytest.mark.parametrize("training", [True, False])
def test_an_mlp_with_dropout_is_not_taken_in_either_mode(training):
    model = build(Starcoder2Config, Starcoder2ForCausalLM, **(NO_DROPOUT | {"residual_dropout": 0.1}))
    with pytest.raises(ValueError, match="has no MLP that can be chunked exactly"):
        find_mlps(model.train(training), required=True)


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(Phi3Config, Phi3ForCausalLM), (MixtralConfig, MixtralForCausalLM)]
)
def test_an_mlp_of_another_structure_is_refused_only_if_it_is_to_be_chunked(config_class, model_class):
    model = build(config_class, model_class, num_key_value_heads=2)
    with pytest.raises(ValueError, match=r"model.layers.0 has no MLP that can be chunked exactly"):
        find_mlps(model, required=True)
    assert find_mlps(model, required=False) == []
    assert loss_structure(model)[1] is model.lm_head


@pytest.mark.parametrize(
    ("config_class", "model_class", "settings", "message"),
    [
        (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}, "does more to its logits"),
        # So wide that it shows only in large logits.
        (
            Gemma2Config,
            Gemma2ForCausalLM,
            {"head_dim": 8, "final_logit_softcapping": 1000.0},
            "does more to its logits",
        ),
        (CohereConfig, CohereForCausalLM, {}, "does more to its logits"),
        (GraniteConfig, GraniteForCausalLM, {"logits_scaling": 8.0}, "does more to its logits"),
        (MixtralConfig, MixtralForCausalLM, {"output_router_logits": True}, "set output_router_logits to false"),
        (LlamaConfig, LlamaModel, {}, "is no causal language model with a linear LM head"),
        (LlamaConfig, LlamaForSequenceClassification, {}, "is no causal language model with a linear LM head"),
    ],
    ids=["gemma2", "gemma2-wide", "cohere", "granite", "mixtral", "llama-body", "llama-classifier"],
)
def test_refuses_a_loss_that_is_not_cross_entropy_of_the_heads_output(config_class, model_class, settings, message):
    model = build(config_class, model_class, num_key_value_heads=2, **settings)
    with pytest.raises(ValueError, match=f"^{model_class.__name__} .*{message}"):
        loss_structure(model)


def test_the_refusal_is_of_the_computation_not_of_the_class():
    plain = build(GraniteConfig, GraniteForCausalLM, num_key_value_heads=2, logits_scaling=1.0)
    assert loss_structure(plain)[1] is plain.lm_head


def test_refuses_a_head_or_a_loss_that_the_user_changed():
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(ValueError, match="is no causal language model with a linear LM head"):
        loss_structure(model)
    model = tiny_model("llama")
    model.loss_function = lambda logits, labels, **kwargs: logits.mean()
    with pytest.raises(ValueError, match="has a loss_function of its own"):
        loss_structure(model)


def test_weights_are_not_needed():
    """Under ZeRO-3 they are placeholders; for planning they are on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1))
    assert len(find_mlps(model, required=True)) == 1
    assert loss_structure(model)[1] is model.lm_head
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert len(find_mlps(model, required=True)) == 2
    assert loss_structure(model)[1] is model.lm_head


def test_looking_changes_nothing():
    model = tiny_model("llama")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    children = {name: dict(module._modules) for name, module in model.named_modules()}
    state = torch.random.get_rng_state()
    find_mlps(model, required=True)
    loss_structure(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())
        assert module._modules == children[name]


def test_llama_without_layers_has_nothing_to_chunk():
    model = build(LlamaConfig, LlamaForCausalLM, num_hidden_layers=0)
    with pytest.raises(ValueError, match="has no decoder layers with an MLP"):
        find_mlps(model, required=True)

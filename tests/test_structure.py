"""What of each architecture is found to be chunkable, whatever its sizes."""

import pytest
import torch
from tiny_models import ARCHITECTURES, EXPERTS, GQA, NO_DROPOUT, build, tiny_model
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from mst_ds.structure import (
    ExpertsStructure,
    MlpStructure,
    TokenwiseStructure,
    decoder_layers,
    find_mlps,
    loss_structure,
)

# The names of gate, up and down in each architecture with MLPs.
GATED = ("gate_proj", "up_proj", "down_proj")
ROLES = {
    "gpt-neox": (None, "dense_h_to_4h", "dense_4h_to_h"),
    "gpt2": (None, "c_fc", "c_proj"),
    "phi": (None, "fc1", "fc2"),
    "phi3": (None, "gate_up_proj", "down_proj"),
    "phi3-longrope": (None, "gate_up_proj", "down_proj"),
    "starcoder2": (None, "c_fc", "c_proj"),
}
OF_EXPERTS = {"mixtral", "qwen3-moe", "olmoe", "gpt-oss"}
TOKENWISE = {"apertus", "falcon", "falcon-alibi"}


@pytest.mark.parametrize("name", sorted(ARCHITECTURES.keys() - OF_EXPERTS - TOKENWISE - {"deepseek-v3"}))
def test_finds_every_layers_mlp(name):
    model = tiny_model(name)
    mlps = find_mlps(model, required=True)
    assert [mlp.module for mlp in mlps] == [layer.mlp for layer in decoder_layers(model)]
    assert len(mlps) == 2
    for mlp in mlps:
        assert isinstance(mlp, MlpStructure)
        expected = tuple(getattr(mlp.module, role) if role else None for role in ROLES.get(name, GATED))
        assert all(found is child for found, child in zip((mlp.gate, mlp.up, mlp.down), expected, strict=True))
        assert mlp.gate_in_up == name.startswith("phi3")
        assert mlp.transposed == (name == "gpt2")
        assert mlp.is_silu == (model.config.hidden_act == "silu" if hasattr(model.config, "hidden_act") else False)


@pytest.mark.parametrize("name", sorted(OF_EXPERTS))
def test_finds_every_layers_experts_and_leaves_the_router_alone(name):
    model = tiny_model(name)
    found = find_mlps(model, required=True)
    assert [experts.module for experts in found] == [layer.mlp.experts for layer in model.model.layers]
    assert all(isinstance(experts, ExpertsStructure) for experts in found)
    assert all(experts.transposed == (name == "gpt-oss") for experts in found)


def test_finds_the_mlp_of_the_first_layer_and_experts_with_the_mlp_beside_them():
    model = tiny_model("deepseek-v3")
    found = find_mlps(model, required=True)
    dense, sparse = (layer.mlp for layer in model.model.layers)
    assert [mlp.module for mlp in found] == [dense, sparse.experts, sparse.shared_experts]
    assert [type(mlp) for mlp in found] == [MlpStructure, ExpertsStructure, MlpStructure]


@pytest.mark.parametrize("name", sorted(TOKENWISE))
def test_takes_an_mlp_with_more_than_linear_layers_as_it_is(name):
    model = tiny_model(name)
    found = find_mlps(model, required=True)
    assert found == [TokenwiseStructure(layer.mlp, 1) for layer in decoder_layers(model)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("config_class", "model_class", "settings"),
    [
        (Starcoder2Config, Starcoder2ForCausalLM, NO_DROPOUT | {"residual_dropout": 0.1}),
        (GPT2Config, GPT2LMHeadModel, {"resid_pdrop": 0.1}),
    ],
)
def test_an_mlp_with_dropout_is_chunked_as_it_is_in_either_mode(config_class, model_class, settings, training):
    model = build(config_class, model_class, **settings).train(training)
    assert [type(mlp) for mlp in find_mlps(model, required=True)] == [TokenwiseStructure] * 2


# Sizes that coincide: each an equation between dimensions that have nothing to do with each other.
MOE_SIZES = {
    "experts = hidden": {"num_experts": 32},
    "experts = intermediate": {"num_experts": 24},
    "experts = 2 intermediate": {"num_experts": 48},
    "experts = half hidden": {"num_experts": 16},
    "experts = vocabulary": {"num_experts": 97},
    "experts = top k": {"num_experts": 2},
    "experts = heads": {"num_experts": 4},
    "intermediate = hidden": {"moe_intermediate_size": 32},
    "intermediate = half hidden": {"moe_intermediate_size": 16},
    "intermediate = 2 hidden": {"moe_intermediate_size": 64},
    "intermediate = quarter hidden": {"moe_intermediate_size": 8},
    "all": {"num_experts": 32, "moe_intermediate_size": 32},
    "experts = intermediate = quarter hidden": {"num_experts": 8, "moe_intermediate_size": 8},
    "2 experts = intermediate = half hidden": {"num_experts": 8, "moe_intermediate_size": 16},
    "odd": {"num_experts": 5, "moe_intermediate_size": 23},
}


@pytest.mark.parametrize("settings", MOE_SIZES.values(), ids=MOE_SIZES)
def test_experts_are_found_whatever_their_sizes(settings):
    base = {**GQA, **EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24}
    with torch.device("meta"):
        model = build(Qwen3MoeConfig, Qwen3MoeForCausalLM, **{**base, **settings})
    assert [type(mlp) for mlp in find_mlps(model, required=True)] == [ExpertsStructure] * 2


@pytest.mark.parametrize(
    "settings",
    [{}, {"intermediate_size": 32}, {"intermediate_size": 4}, {"num_local_experts": 32}, {"intermediate_size": 16}],
    ids=str,
)
def test_transposed_experts_are_found_whatever_their_sizes(settings):
    base = {**GQA, **EXPERTS, "head_dim": 8, "num_local_experts": 4}
    with torch.device("meta"):
        model = build(GptOssConfig, GptOssForCausalLM, **{**base, **settings})
    assert [type(mlp) for mlp in find_mlps(model, required=True)] == [ExpertsStructure] * 2


REAL_SIZES = {
    "mixtral-8x7b": (
        MixtralConfig,
        MixtralForCausalLM,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8},
    ),
    "gpt-oss-20b": (
        GptOssConfig,
        GptOssForCausalLM,
        {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32},
    ),
    # As many experts as each is wide.
    "qwen3-next-80b": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"hidden_size": 2048, "moe_intermediate_size": 512, "num_experts": 512},
    ),
    "qwen3-30b": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128},
    ),
    "llama-70b": (LlamaConfig, LlamaForCausalLM, {"hidden_size": 8192, "intermediate_size": 28672}),
    "phi3-mini": (Phi3Config, Phi3ForCausalLM, {"hidden_size": 3072, "intermediate_size": 8192}),
}


@pytest.mark.parametrize(("config_class", "model_class", "sizes"), REAL_SIZES.values(), ids=REAL_SIZES)
def test_real_sizes(config_class, model_class, sizes):
    config = config_class(**sizes, num_hidden_layers=1, vocab_size=97, pad_token_id=0)
    with torch.device("meta"):
        model = model_class(config)
    assert [type(mlp) for mlp in find_mlps(model, required=True)] != [TokenwiseStructure]


class InBlocks(nn.Module):
    """Mixes tokens in blocks of a number that may be one of the model's sizes."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x):
        out = self.down(self.up(x).relu())
        for start in range(self.size, x.shape[1], self.size):
            out = torch.cat([out[:, :start], out[:, start:] + out[:, start - 1 : start]], dim=1)
        return out


@pytest.mark.parametrize("size", [4, 16, 32, 48, 64, 128])
def test_a_number_that_is_a_size_by_chance_hides_nothing(size):
    model = tiny_model("llama")
    model.model.layers[1].mlp = InBlocks(size)
    assert find_mlps(model, required=False) == []


def test_a_convolution_beside_the_mlp_is_no_mixture_of_experts():
    """Its weight has three dimensions, too."""
    model = build(Lfm2Config, Lfm2ForCausalLM, **GQA, layer_types=["conv", "full_attention"])
    found = find_mlps(model, required=True)
    assert [mlp.module for mlp in found] == [layer.feed_forward for layer in model.model.layers]


def test_what_has_no_mlp_of_a_module_is_refused_only_if_it_is_to_be_chunked():
    settings = {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = build(JetMoeConfig, JetMoeForCausalLM, **settings)
    with pytest.raises(ValueError, match=r"model.layers.0 has no MLP that can be chunked exactly"):
        find_mlps(model, required=True)
    assert find_mlps(model, required=False) == []


def test_weights_are_not_needed():
    """Under ZeRO-3 they are placeholders; for planning they are on the meta device."""
    for name in ("llama", "gpt2", "qwen3-moe", "apertus"):
        config_class, model_class, settings = ARCHITECTURES[name]
        with torch.device("meta"):
            model = build(config_class, model_class, **settings)
        kinds = [type(mlp) for mlp in find_mlps(model, required=True)]
        structure = loss_structure(model)
        assert structure.head is model.get_output_embeddings()
        model = tiny_model(name)
        for parameter in model.parameters():
            parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
        assert [type(mlp) for mlp in find_mlps(model, required=True)] == kinds
        assert loss_structure(model).head is model.get_output_embeddings()


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "apertus"])
def test_looking_changes_nothing(name):
    model = tiny_model(name)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    children = {name: dict(module._modules) for name, module in model.named_modules()}
    config = model.config.to_dict()
    state = torch.random.get_rng_state()
    find_mlps(model, required=True)
    loss_structure(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config.to_dict() == config
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())
        assert module._modules == children[name]


def test_llama_without_layers_has_nothing_to_chunk():
    model = build(LlamaConfig, LlamaForCausalLM, num_hidden_layers=0)
    with pytest.raises(ValueError, match="has no decoder layers with an MLP"):
        find_mlps(model, required=True)

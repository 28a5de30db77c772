"""Recompute changes nothing in what is computed: gradients, random numbers, autocast, whatever is kept wherever."""

import copy
import functools

import pytest
import torch
from plain_model import TOLERANCE, assert_close, loss_and_gradients, make_batch
from sharded import sharded_loss_and_gradients
from tiny import tiny_settings
from tiny_models import build, tiny_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from mst_ds import apply_settings
from mst_ds.recompute import LayerRecompute

# Rows of it are above the size from which tensors go to the host.
LENGTH = 30
BATCH = make_batch(LENGTH)
KEPT = [
    pytest.param({"keep_attention": keep, "keep_mlp": keep, "offload_activations": offload}, id=f"{keep=}-{offload=}")
    for keep in (False, True)
    for offload in (False, True)
]
NO_RECOMPUTE = {"recompute": False}


def patched(model, **settings):
    return apply_settings(copy.deepcopy(model), tiny_settings(**settings))


@functools.cache
def plain(name):
    return loss_and_gradients(tiny_model(name), **BATCH)


# Norms before and after, LayerNorm with biases, experts, windows, sinks, heads of two widths.
MODELS = ["llama", "gemma2", "gemma3", "olmo2", "gpt2", "phi", "mixtral", "gpt-oss", "deepseek-v3"]


@pytest.mark.parametrize("settings", [KEPT[0], KEPT[-1]])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_plain_models(name, settings):
    assert_close(loss_and_gradients(patched(tiny_model(name), **settings), **BATCH), plain(name))


@pytest.mark.parametrize("settings", [*KEPT, NO_RECOMPUTE])
@pytest.mark.parametrize("head_groups", [1, 2])
def test_gradients_are_the_plain_models_on_shards(settings, head_groups):
    found = sharded_loss_and_gradients(tiny_model("llama"), BATCH, head_groups=head_groups, **settings)
    assert_close(found, plain("llama"))


@pytest.mark.parametrize("name", ["olmo2", "gemma3", "gpt-oss", "deepseek-v3"])
def test_gradients_of_other_models_are_the_plain_models_on_shards(name):
    settings = {"keep_attention": True, "offload_activations": True}
    found = sharded_loss_and_gradients(tiny_model(name), BATCH, head_groups=2, **settings)
    assert_close(found, plain(name))


def documents():
    """Two rows with other documents each."""
    rows = ([11, 13, 6], [30])
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    # A document's last token has no target.
    return {**BATCH, "labels": BATCH["labels"].masked_fill(positions == 0, -100), "position_ids": positions}


@pytest.mark.parametrize("settings", KEPT)
def test_packed_documents(settings):
    model, batch = tiny_model("llama"), documents()
    expected = loss_and_gradients(patched(model, **NO_RECOMPUTE), **batch)
    assert_close(loss_and_gradients(patched(model, **settings), **batch), expected, tolerance=1e-12)
    found = sharded_loss_and_gradients(model, batch, head_groups=2, **settings)
    assert_close(found, expected)


def gpt2_with_dropout():
    dropout = {"resid_pdrop": 0.2, "attn_pdrop": 0.3, "embd_pdrop": 0.1}
    return build(GPT2Config, GPT2LMHeadModel, n_inner=48, **dropout)


def llama_with_dropout():
    return build(LlamaConfig, LlamaForCausalLM, num_key_value_heads=2, attention_dropout=0.3)


def seeded_step(model, autocast=False):
    """A step, and the random numbers that come after its forward and after its backward."""
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**BATCH).loss
    after = [torch.rand(())]
    loss.backward()
    after.append(torch.rand(()))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), "after": torch.stack(after), **gradients}


def assert_equal(actual, expected):
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not different, different


@pytest.mark.parametrize("settings", KEPT)
@pytest.mark.parametrize("make", [gpt2_with_dropout, llama_with_dropout])
def test_random_numbers_are_those_of_the_forward(make, settings):
    expected = seeded_step(patched(make(), **NO_RECOMPUTE))
    assert_equal(seeded_step(patched(make(), **settings)), expected)


def test_dropout_of_attention_is_at_work():
    # Else the test above would see nothing.
    model = patched(llama_with_dropout(), **NO_RECOMPUTE)
    dropped = seeded_step(model)["loss"]
    assert seeded_step(model.eval())["loss"] != dropped


@pytest.mark.parametrize("settings", KEPT)
@pytest.mark.parametrize("make", [gpt2_with_dropout, llama_with_dropout, functools.partial(tiny_model, "olmo2")])
def test_autocast_is_that_of_the_forward(make, settings):
    expected = seeded_step(patched(make().float(), **NO_RECOMPUTE), autocast=True)
    assert_equal(seeded_step(patched(make().float(), **settings), autocast=True), expected)


@pytest.mark.parametrize("settings", KEPT)
def test_two_forwards_before_their_backwards(settings):
    model = patched(tiny_model("llama"), **settings)
    first, second = BATCH, {**BATCH, "input_ids": BATCH["input_ids"].flip(1)}
    single = [loss_and_gradients(tiny_model("llama"), **batch) for batch in (first, second)]
    losses = [model(**batch).loss for batch in (first, second)]
    # The older one first, which is not the order in which layers hand their tensors to each other.
    for loss in losses:
        loss.backward()
    for name, parameter in model.named_parameters():
        expected = single[0][name] + single[1][name]
        assert (parameter.grad - expected).norm() <= TOLERANCE * expected.norm(), name


@pytest.mark.parametrize("settings", KEPT)
def test_a_forward_without_a_backward_does_not_disturb_the_next(settings):
    model = patched(tiny_model("llama"), **settings)
    model(**BATCH)
    assert_close(loss_and_gradients(model, **BATCH), plain("llama"))
    with torch.no_grad():
        assert torch.equal(model(**BATCH).loss, plain_loss(settings))


def plain_loss(settings):
    return patched(tiny_model("llama"), **settings)(**BATCH).loss.detach()


@pytest.mark.parametrize("settings", KEPT)
def test_a_second_backward_is_refused(settings):
    loss = patched(tiny_model("llama"), **settings)(**BATCH).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second (backward|time)"):
        loss.backward()


@pytest.mark.parametrize("settings", KEPT)
def test_only_some_parameters_are_trained(settings):
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp.up_proj" in name)
    found = loss_and_gradients(patched(model, **settings), **BATCH)
    trained = {name: value for name, value in found.items() if value is not None}
    assert len(trained) == 2
    assert_close(trained, {name: plain("llama")[name] for name in trained})


class Layer(torch.nn.Module):
    """Notes a random number, and what the layer call says of itself."""

    def __init__(self, recompute):
        super().__init__()
        self.recompute, self.seen = recompute, []

    def forward(self, x):
        notes = [self.recompute.call.note(lambda: torch.rand(()).item()) for _ in range(2)]
        self.seen.append((self.recompute.is_recomputing, notes))
        return (x * x.detach()).sin()


def test_notes_are_given_again_in_their_order():
    recompute = LayerRecompute(keep_attention=True)
    layers = [Layer(recompute), Layer(recompute)]
    x = torch.randn(3, 4, requires_grad=True)
    assert not recompute.is_recomputing
    y = x
    for layer in layers:
        y = recompute.run_layer(layer, y)
    assert recompute.call is None
    y.sum().backward()
    assert recompute.call is None
    for layer in layers:
        (first, notes), (again, found) = layer.seen
        assert (first, again) == (False, True)
        assert found == notes
        assert len(set(notes)) == 2
    assert layers[0].seen[0] != layers[1].seen[0]


def test_an_error_in_a_layer_leaves_no_layer_call():
    recompute = LayerRecompute(keep_attention=True)

    def fails(x):
        raise ValueError("of the layer")

    with pytest.raises(ValueError, match="of the layer"):
        recompute.run_layer(fails, torch.ones(2, requires_grad=True))
    assert recompute.call is None


def test_without_gradients_nothing_is_noted():
    recompute = LayerRecompute(keep_attention=True)
    calls = []
    with torch.no_grad():
        recompute.run_layer(lambda x: calls.append(recompute.call), torch.ones(2))
    assert calls == [None]

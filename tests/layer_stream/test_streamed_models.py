"""Models whose layers run chunk by chunk: the plain model's gradients, whatever is kept wherever."""

import copy
import functools

import pytest
import torch
from adapted import ATTENTION, MLP, adapted
from plain_model import TOLERANCE, assert_close, loss_and_gradients, make_batch
from sharded import sharded_loss_and_gradients
from streamed_models import BATCH, KEPT, NO_RECOMPUTE, patched
from tiny import tiny_settings
from tiny_models import ARCHITECTURES, build, tiny_model
from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

from mst_ds import apply_settings

CHUNKS = pytest.mark.parametrize("layer_chunks", [1, 4])


@functools.cache
def plain(name):
    return loss_and_gradients(tiny_model(name), **BATCH)


# Norms before and after, LayerNorm with biases, tied weights, experts, windows, sinks, heads of two widths, an
# attention that is written out, and one of a model's own, whose layers are not cut.
MODELS = [
    *("llama-bias-tied", "gemma2", "gemma3", "olmo2", "gpt2", "phi", "mixtral", "gpt-oss", "deepseek-v3", "apertus"),
    *("falcon", "falcon-alibi"),
]


@pytest.mark.parametrize(
    ("layer_chunks", "settings"),
    [(1, KEPT[-1].values[0]), (4, KEPT[0].values[0]), (4, KEPT[-1].values[0])],
    ids=["kept", "chunks", "chunks-kept"],
)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_plain_models(name, layer_chunks, settings):
    model = patched(tiny_model(name), layer_chunks=layer_chunks, **settings)
    assert_close(loss_and_gradients(model, **BATCH), plain(name))


@pytest.mark.parametrize("length", [15, 16, 17, 61])
def test_any_length(length):
    """Also where there are fewer chunks than asked for, of 4 tokens at least."""
    batch, model = make_batch(length, seed=2), tiny_model("llama")
    batch["labels"] = batch["input_ids"].clone()
    found = loss_and_gradients(patched(model, layer_chunks=7, keep_attention=True), **batch)
    assert_close(found, loss_and_gradients(model, **batch))


@pytest.mark.parametrize(
    ("layer_chunks", "settings"),
    [*((1, each.values[0]) for each in KEPT), (4, KEPT[0].values[0]), (4, KEPT[-1].values[0]), (1, NO_RECOMPUTE)],
    ids=str,
)
@pytest.mark.parametrize("head_groups", [1, 2])
def test_gradients_are_the_plain_models_on_shards(head_groups, layer_chunks, settings):
    settings = {"layer_chunks": layer_chunks, "head_groups": head_groups, **settings}
    assert_close(sharded_loss_and_gradients(tiny_model("llama"), BATCH, **settings), plain("llama"))


@CHUNKS
@pytest.mark.parametrize("name", ["olmo2", "gemma3", "gpt-oss", "deepseek-v3"])
def test_gradients_of_other_models_are_the_plain_models_on_shards(name, layer_chunks):
    settings = {"keep_attention": True, "offload_activations": True, "layer_chunks": layer_chunks}
    found = sharded_loss_and_gradients(tiny_model(name), BATCH, head_groups=2, **settings)
    assert_close(found, plain(name))


def documents():
    """Two rows with other documents each."""
    rows = ([21, 27, 16], [64])
    positions = torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in rows])
    # A document's last token has no target.
    return {**BATCH, "labels": BATCH["labels"].masked_fill(positions == 0, -100), "position_ids": positions}


@CHUNKS
@pytest.mark.parametrize("settings", KEPT)
def test_packed_documents(settings, layer_chunks):
    model, batch, settings = tiny_model("llama"), documents(), {**settings, "layer_chunks": layer_chunks}
    expected = loss_and_gradients(patched(model, **NO_RECOMPUTE), **batch)
    # The norms' fp32 makes of another order of sums in attention a difference of its last bit.
    tolerance = 1e-12 if layer_chunks == 1 else TOLERANCE
    assert_close(loss_and_gradients(patched(model, **settings), **batch), expected, tolerance=tolerance)
    found = sharded_loss_and_gradients(model, batch, head_groups=2, **settings)
    assert_close(found, expected)


def test_a_layer_of_two_attentions_whose_last_chunk_begins_a_document():
    """Only here several operators of a layer have keys computed again, of which the last chunk reads none."""
    sizes = {"expert_ffn_hidden_size": 16, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "num_layers": 1}
    widths = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    model = build(LongcatFlashConfig, LongcatFlashForCausalLM, ffn_hidden_size=48, head_dim=8, **sizes, **widths)
    batch = {**BATCH, "position_ids": torch.cat([torch.arange(48), torch.arange(16)]).expand(2, -1)}
    expected = loss_and_gradients(patched(model, **NO_RECOMPUTE), **batch)
    assert_close(loss_and_gradients(patched(model, layer_chunks=4), **batch), expected)


@pytest.mark.parametrize("layer_chunks", [1, 4])
@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "gpt-oss"])
def test_router_logits_of_chunks_are_joined_in_the_order_of_tokens(name, layer_chunks):
    """In a batch of several rows; the router loss differentiates them."""
    config_class, model_class, settings = ARCHITECTURES[name]
    # Such a weight that a gradient that went missing would show.
    model = build(config_class, model_class, **settings, output_router_logits=True, router_aux_loss_coef=1.0)
    streamed = patched(model, layer_chunks=layer_chunks, keep_attention=True)
    expected, found = (each(**BATCH, output_router_logits=True) for each in (model, streamed))
    assert len(found.router_logits) == len(expected.router_logits) == 2
    for logits, wanted in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(logits, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    assert_close(loss_and_gradients(streamed, **BATCH), loss_and_gradients(model, **BATCH))
    # Not only through the loss: whoever asks for them may differentiate them.
    gates = [name for name, _ in model.named_parameters() if "layers.1." in name and name.endswith("norm.weight")]
    of_logits = []
    for each in (model, streamed):
        logits = each.model(BATCH["input_ids"], output_router_logits=True).router_logits[1]
        weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
        parameters = [each.get_parameter(gate) for gate in gates]
        of_logits.append(dict(zip(gates, torch.autograd.grad((logits * weights).sum(), parameters), strict=True)))
    assert_close(of_logits[1], of_logits[0])


@CHUNKS
@pytest.mark.parametrize("targets", [ATTENTION, MLP, ATTENTION + MLP], ids=["attention", "mlp", "both"])
@pytest.mark.parametrize("keep", [False, True])
def test_adapters_on_frozen_layers(targets, keep, layer_chunks):
    adapter = {"target_modules": targets}
    model = adapted("llama", adapter)
    expected = loss_and_gradients(model, **BATCH)
    assert {name for name in expected if "lora" not in name} == {"loss"}
    settings = {"keep_attention": keep, "offload_activations": keep, "layer_chunks": layer_chunks}
    planned = apply_settings(adapted("llama", adapter), tiny_settings(**settings))
    assert_close(loss_and_gradients(planned, **BATCH), expected)


@CHUNKS
@pytest.mark.parametrize("settings", KEPT)
def test_only_some_parameters_are_trained(settings, layer_chunks):
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.1.mlp.up_proj" in name)
    found = loss_and_gradients(patched(model, layer_chunks=layer_chunks, **settings), **BATCH)
    trained = {name: value for name, value in found.items() if value is not None}
    assert len(trained) == 2
    assert_close(trained, {name: plain("llama")[name] for name in trained})


def test_what_is_trained_may_change_between_steps():
    """Which output nobody reads depends on it."""
    model = patched(tiny_model("llama"), layer_chunks=4)
    loss_and_gradients(model, **BATCH)
    for is_trained in (False, True):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_trained or "o_proj" in name)
        found = loss_and_gradients(model, **BATCH)
        assert len(found) == (len(plain("llama")) if is_trained else 3)
        assert_close(found, {name: plain("llama")[name] for name in found})


@CHUNKS
@pytest.mark.parametrize("settings", KEPT)
def test_two_forwards_before_their_backwards(settings, layer_chunks):
    model = patched(tiny_model("llama"), layer_chunks=layer_chunks, **settings)
    first, second = BATCH, {**BATCH, "input_ids": BATCH["input_ids"].flip(1)}
    single = [loss_and_gradients(tiny_model("llama"), **batch) for batch in (first, second)]
    losses = [model(**batch).loss for batch in (first, second)]
    # The older one first, which is not the order in which layers hand their tensors to each other.
    for loss in losses:
        loss.backward()
    expected = {name: single[0][name] + single[1][name] for name, _ in model.named_parameters()}
    assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)
    # And one loss of both.
    model.zero_grad()
    sum(model(**batch).loss for batch in (first, second)).backward()
    assert_close({name: parameter.grad for name, parameter in model.named_parameters()}, expected)


@CHUNKS
@pytest.mark.parametrize("settings", KEPT)
def test_a_forward_without_a_backward_does_not_disturb_the_next(settings, layer_chunks):
    model = patched(tiny_model("llama"), layer_chunks=layer_chunks, **settings)
    model(**BATCH)
    assert_close(loss_and_gradients(model, **BATCH), plain("llama"))
    loss = model(**BATCH).loss
    with torch.no_grad():
        assert torch.equal(model(**BATCH).loss, loss.detach())
    model.eval()
    assert torch.equal(model(**BATCH).loss, loss.detach())


@CHUNKS
@pytest.mark.parametrize("settings", KEPT)
def test_a_second_backward_is_refused(settings, layer_chunks):
    loss = patched(tiny_model("llama"), layer_chunks=layer_chunks, **settings)(**BATCH).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second (backward|time)"):
        loss.backward()


@pytest.mark.parametrize("settings", [KEPT[0], KEPT[-1]])
def test_generates_between_steps(settings):
    """A chunk is no step of generation: layers run as they are then."""
    ids = BATCH["input_ids"][:, :12]
    asked = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = tiny_model("llama").generate(ids, **asked)
    model = patched(tiny_model("llama"), layer_chunks=3, **settings)
    for _ in range(2):
        assert torch.equal(model.generate(ids, **asked), expected)
        assert_close(loss_and_gradients(model, **BATCH), plain("llama"))


@CHUNKS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits(dtype, layer_chunks):
    """The error is that of 16 bits; see test_stream_budget.py for how small it is."""
    model = tiny_model("llama").to(dtype)
    expected = loss_and_gradients(copy.deepcopy(model).double(), **BATCH)
    found = loss_and_gradients(patched(model, layer_chunks=layer_chunks, keep_attention=True), **BATCH)
    assert {value.dtype for name, value in found.items() if name != "loss"} == {dtype}
    assert_close({name: value.double() for name, value in found.items()}, expected, tolerance=0.05)


def test_an_mlp_whose_input_has_no_gradient(monkeypatch):
    def forward(self, hidden_states, **kwargs):
        attended = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)[0]
        return attended + self.mlp(self.post_attention_layernorm(attended.detach()))

    model = tiny_model("llama")
    monkeypatch.setattr(type(model.model.layers[0]), "forward", forward)
    assert_close(
        loss_and_gradients(patched(model, layer_chunks=4), **BATCH), loss_and_gradients(copy.deepcopy(model), **BATCH)
    )

"""A patched model against the plain one, in one process."""

import copy
import functools
import inspect
import math

import pytest
import torch
from tiny import VOCAB_SIZE, tiny_llama, tiny_plan
from tiny_models import ARCHITECTURES, build, tiny_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import mst_ds.patch
from mst_ds import apply_plan, remove_plan
from mst_ds.topology import Topology

# The models are fp64. But transformers computes the loss, and most norms and rotary embeddings, in fp32 in any model,
# and rounding to fp32 turns a last-bit difference of the fp64 input into one of 6e-8.
TOLERANCE = 1e-6


def make_batch(length=29, vocab_size=97):
    """Two sequences whose labels are ignored in a part of the first, the whole start of the second."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, vocab_size, (2, length), generator=generator)
    labels = ids.clone()
    labels[0, 5:9] = labels[1, :20] = -100
    return {"input_ids": ids, "labels": labels}


def loss_and_gradients(model, **batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm()
        assert error <= TOLERANCE, f"{name}: relative error {error:.1e}"


def attributes(model):
    """Every attribute of every module: what a plan must leave as it was, to the very object."""
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def assert_untouched(model, before):
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys(), name
        changed = [key for key, value in before[name].items() if module.__dict__[key] is not value]
        assert not changed, f"{name}: {changed}"


@pytest.fixture
def count_calls(monkeypatch):
    """Counts the calls of a function that `mst_ds.patch` uses, and records their chunk counts."""

    def watch(name):
        calls = []
        original = getattr(mst_ds.patch, name)

        @functools.wraps(original)
        def counting(*args, **kwargs):
            calls.append(kwargs["chunks"])
            return original(*args, **kwargs)

        monkeypatch.setattr(mst_ds.patch, name, counting)
        return calls

    return watch


@functools.cache
def plain_gradients(name):
    return loss_and_gradients(tiny_model(name), **make_batch())


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_the_plain_models(name, recompute):
    model = tiny_model(name)
    assert apply_plan(model, tiny_plan(recompute=recompute)) is model
    assert_close(loss_and_gradients(model, **make_batch()), plain_gradients(name))


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_the_plan_is_what_runs(count_calls, recompute):
    mlps, losses = count_calls("chunked_mlp"), count_calls("chunked_loss")
    model = apply_plan(tiny_model("llama"), tiny_plan(mlp_chunks=5, loss_chunks=6, recompute=recompute))
    attentions = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: attentions.append(1))
    loss = model(**make_batch()).loss
    assert (len(mlps), len(attentions)) == (2, 2)
    loss.backward()
    # Recompute runs each layer once more.
    assert len(attentions) == (4 if recompute else 2)
    assert set(mlps) == {5}
    assert losses == [6]


@pytest.mark.parametrize("num_items", [100, torch.tensor(100)], ids=["int", "tensor"])
def test_num_items_in_batch_and_labels_that_are_already_shifted(num_items):
    batch = make_batch()
    plain = loss_and_gradients(tiny_model("llama"), **batch, num_items_in_batch=num_items)
    model = apply_plan(tiny_model("llama"), tiny_plan())
    assert_close(loss_and_gradients(model, **batch, num_items_in_batch=num_items), plain)
    shifted = torch.full_like(batch["labels"], -100)
    shifted[:, :-1] = batch["labels"][:, 1:]
    only_shifted = {"input_ids": batch["input_ids"], "shift_labels": shifted}
    assert_close(loss_and_gradients(model, **only_shifted, num_items_in_batch=num_items), plain)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches(side):
    batch = make_batch()
    mask = torch.ones_like(batch["input_ids"])
    padding = slice(0, 6) if side == "left" else slice(-6, None)
    mask[1, padding] = 0
    batch["labels"][1, padding] = -100
    batch["attention_mask"] = mask
    plain = loss_and_gradients(tiny_model("llama"), **batch)
    model = apply_plan(tiny_model("llama"), tiny_plan(recompute=True))
    assert_close(loss_and_gradients(model, **batch), plain)


def test_packed_documents():
    batch = make_batch()
    batch["position_ids"] = torch.cat([torch.arange(13), torch.arange(16)]).expand(2, -1)
    # transformers keeps packed documents apart only where it makes no cache.
    plain = loss_and_gradients(tiny_model("llama"), **batch, use_cache=False)
    model = apply_plan(tiny_model("llama"), tiny_plan())
    assert_close(loss_and_gradients(model, **batch), plain)


def test_embeddings_as_input():
    plain, patched, batch = tiny_model("llama"), apply_plan(tiny_model("llama"), tiny_plan()), make_batch()
    embeddings = plain.get_input_embeddings()(batch["input_ids"]).detach()
    losses = [model(inputs_embeds=embeddings, labels=batch["labels"]).loss for model in (patched, plain)]
    assert abs(losses[0] / losses[1] - 1) <= TOLERANCE


def test_frozen_parameters_get_no_gradient():
    """A trained head on a frozen body, and trained MLPs behind frozen embeddings."""
    for trained in ("lm_head", "mlp"):
        results = []
        for model in (tiny_model("llama"), apply_plan(tiny_model("llama"), tiny_plan(recompute=True))):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained in name)
            results.append(loss_and_gradients(model, **make_batch()))
        plain, patched = ({name: value for name, value in result.items() if value is not None} for result in results)
        assert len(plain) == 1 + (1 if trained == "lm_head" else 6)
        assert_close(patched, plain)


def test_without_labels_the_logits_are_there():
    model, ids = tiny_model("llama"), make_batch()["input_ids"]
    expected = model(input_ids=ids).logits
    apply_plan(model, tiny_plan())
    output = model(input_ids=ids)
    torch.testing.assert_close(output.logits, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert output.loss is None
    # A model that keeps its own MLP computes nothing in another way.
    own = tiny_model("llama")
    apply_plan(own, tiny_plan(mlp_chunks=1))
    torch.testing.assert_close(own(input_ids=ids).logits, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_with_labels_there_are_no_logits_but_all_else_that_was_asked_for():
    plain, batch = tiny_model("llama"), make_batch()
    patched = apply_plan(tiny_model("llama"), tiny_plan())
    expected = plain(**batch, output_hidden_states=True)
    output = patched(**batch, output_hidden_states=True)
    assert output.logits is None
    assert output.past_key_values is None
    assert len(output.hidden_states) == len(expected.hidden_states) == 3
    for actual, hidden_states in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(actual, hidden_states, rtol=TOLERANCE, atol=TOLERANCE)


def test_evaluation_without_gradients():
    plain, patched = tiny_model("llama").eval(), apply_plan(tiny_model("llama"), tiny_plan(recompute=True)).eval()
    with torch.no_grad():
        losses = [model(**make_batch()).loss for model in (patched, plain)]
    assert not losses[0].requires_grad
    assert abs(losses[0] / losses[1] - 1) <= TOLERANCE


def test_a_batch_whose_labels_are_all_ignored():
    model, batch = apply_plan(tiny_model("llama"), tiny_plan(recompute=True)), make_batch()
    results = loss_and_gradients(model, input_ids=batch["input_ids"], labels=torch.full_like(batch["labels"], -100))
    assert all(torch.equal(value, torch.zeros_like(value)) for value in results.values())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_removing_the_plan_restores_the_model_bit_for_bit(name):
    model, batch = tiny_model(name), make_batch()
    expected, before = loss_and_gradients(model, **batch), attributes(model)
    logits = model(input_ids=batch["input_ids"]).logits
    apply_plan(model, tiny_plan(recompute=True, zero_stage=3))
    loss_and_gradients(model, **batch)
    assert remove_plan(model) is model
    assert_untouched(model, before)
    actual = loss_and_gradients(model, **batch)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)


def test_removing_the_plan_of_a_shard_restores_the_config_and_its_attention():
    model = tiny_model("llama")
    before, config = attributes(model), model.config
    # Nothing communicates before a forward, so any object will do for the group.
    apply_plan(model, tiny_plan(topology=Topology(0, 2, 2), recompute=True), sequence_group=object())
    assert model.config is not config
    assert model.config._attn_implementation != config._attn_implementation == "sdpa"
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)
    remove_plan(model)
    assert model.config is config
    assert_untouched(model, before)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_removing_the_plan_restores_a_recompute_that_the_user_had_set():
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    before = attributes(model)
    apply_plan(model, tiny_plan(recompute=True))
    remove_plan(model)
    assert_untouched(model, before)
    assert model.is_gradient_checkpointing


def test_a_plan_can_follow_another():
    model = tiny_model("llama")
    for chunks in (2, 7):
        apply_plan(model, tiny_plan(mlp_chunks=chunks, loss_chunks=chunks, recompute=True))
        assert_close(loss_and_gradients(model, **make_batch()), plain_gradients("llama"))
        remove_plan(model)


def test_generates_with_the_plan_and_after_it():
    model, ids = tiny_model("llama").eval(), make_batch()["input_ids"][:, :5]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **settings)
    apply_plan(model, tiny_plan(recompute=True))
    assert torch.equal(model.generate(ids, **settings), expected)
    remove_plan(model)
    assert torch.equal(model.generate(ids, **settings), expected)


def test_another_instance_with_the_same_config_is_left_alone():
    model, batch = tiny_model("llama"), make_batch()
    other = type(model)(model.config).double()
    other.load_state_dict(model.state_dict())
    before, expected = attributes(other), loss_and_gradients(other, **batch)
    apply_plan(model, tiny_plan(topology=Topology(0, 2, 2), recompute=True), sequence_group=object())
    assert_untouched(other, before)
    assert type(model) is type(other)
    assert other(**batch).logits.shape == (2, 29, 97)
    actual = loss_and_gradients(other, **batch)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_second_plan_is_refused_and_the_first_stays():
    model = apply_plan(tiny_model("llama"), tiny_plan())
    with pytest.raises(ValueError, match=r"has a plan already: call mst_ds.remove_plan\(model\) first"):
        apply_plan(model, tiny_plan())
    assert_close(loss_and_gradients(model, **make_batch()), plain_gradients("llama"))
    remove_plan(model)
    with pytest.raises(ValueError, match="the model has no plan"):
        remove_plan(model)


@pytest.mark.parametrize(
    ("config_class", "model_class", "settings", "plan", "message"),
    [
        (Gemma2Config, Gemma2ForCausalLM, {"head_dim": 8}, {}, "does more to its logits"),
        (MixtralConfig, MixtralForCausalLM, {"output_router_logits": True}, {"mlp_chunks": 1}, "output_router_logits"),
        (Phi3Config, Phi3ForCausalLM, {}, {}, 'set "mlp_chunks": 1'),
        (Phi3Config, Phi3ForCausalLM, {"sliding_window": 8}, {"topology": Topology(0, 2, 2)}, "sliding_window 8"),
    ],
    ids=["softcapping", "router-loss", "mlp", "sliding-window"],
)
def test_a_model_that_is_refused_is_not_changed(config_class, model_class, settings, plan, message):
    model = build(config_class, model_class, num_key_value_heads=2, **settings)
    before = attributes(model)
    with pytest.raises(ValueError, match=message):
        apply_plan(model, tiny_plan(**plan))
    assert_untouched(model, before)


@pytest.mark.parametrize(
    ("config_class", "model_class", "settings"),
    [
        (Phi3Config, Phi3ForCausalLM, {}),
        # Its default has no fp64.
        (MixtralConfig, MixtralForCausalLM, {"experts_implementation": "eager"}),
    ],
    ids=["phi3", "mixtral"],
)
def test_a_model_keeps_an_mlp_of_another_structure_where_one_chunk_is_planned(config_class, model_class, settings):
    model = build(config_class, model_class, num_key_value_heads=2, **settings)
    plain = loss_and_gradients(model, **make_batch())
    forwards = [layer.mlp.forward for layer in model.model.layers]
    apply_plan(model, tiny_plan(mlp_chunks=1, recompute=True))
    assert [layer.mlp.forward for layer in model.model.layers] == forwards
    assert_close(loss_and_gradients(model, **make_batch()), plain)


def test_zero3_gathers_a_whole_mlp_at_once():
    from deepspeed.utils import z3_leaf_module

    model = tiny_model("llama")
    for stage in (2, 3):
        apply_plan(model, tiny_plan(zero_stage=stage))
        assert [z3_leaf_module(layer.mlp) for layer in model.model.layers] == [stage == 3] * 2
        remove_plan(model)
        assert not any(z3_leaf_module(module) for module in model.modules())


def test_a_deep_copy_computes_with_its_own_weights_and_has_its_own_plan():
    model = apply_plan(tiny_llama(), tiny_plan())
    inputs = {"input_ids": torch.arange(16)[None], "labels": torch.arange(16)[None]}
    before = model(**inputs).loss
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(**inputs).loss.item() == pytest.approx(math.log(VOCAB_SIZE))
    remove_plan(copied)
    assert copied(**inputs).logits is not None
    assert torch.equal(model(**inputs).loss, before)
    assert model(**inputs).logits is None


def test_the_calling_conventions_of_transformers_are_kept():
    model = apply_plan(tiny_llama(), tiny_plan())
    ids = torch.arange(32).view(2, 16)
    mask = torch.ones_like(ids)
    loss = model(ids, mask, labels=ids).loss
    as_tuple = model(ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], loss)
    assert "labels" in inspect.signature(model.forward).parameters


def test_positional_arguments_and_ignore_index_mean_what_they_meant():
    model = tiny_llama()
    ids = torch.arange(32).view(2, 16)
    names = list(inspect.signature(model.forward).parameters)
    positional = [ids, *[None] * (names.index("labels") - 1), ids]
    expected = model(*positional).loss, model(ids, labels=ids, ignore_index=5).loss
    apply_plan(model, tiny_plan())
    torch.testing.assert_close((model(*positional).loss, model(ids, labels=ids, ignore_index=5).loss), expected)
    assert not torch.equal(*expected)


def test_gpt2_with_its_own_mlp():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=97, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = GPT2LMHeadModel(config)
    ids = torch.arange(16)[None]
    expected = model(ids, labels=ids).loss
    apply_plan(model, tiny_plan(mlp_chunks=1))  # its MLP has no nn.Linear: left as it is
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


def test_a_forward_that_cannot_be_probed_is_said_to_be_that():
    model = OPTForCausalLM(
        OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=97)
    )
    with pytest.raises(ValueError, match="cannot be checked"):
        apply_plan(model, tiny_plan(mlp_chunks=1))

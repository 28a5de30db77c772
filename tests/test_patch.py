"""A patched model against the plain one, in one process."""

import copy
import functools
import math

import pytest
import torch
from plain_model import assert_close, loss_and_gradients, make_batch
from sharded import sharded_loss_and_gradients
from tiers import slow_but_for
from tiny import VOCAB_SIZE, tiny_llama, tiny_settings
from tiny_models import ARCHITECTURES, EXPERTS, GQA, SHARDABLE, build, tiny_model
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import mst_ds.patching.operators
import mst_ds.structure.mlps
from mst_ds import apply_settings, remove_plan
from mst_ds.patching.logits import LogitsLeftOutByThePlan


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
    """Counts the calls of an operator that a module uses, and records their chunk counts."""

    def watch(module, name):
        calls = []
        original = getattr(module, name)

        @functools.wraps(original)
        def counting(*args, **kwargs):
            calls.append(kwargs["chunks"])
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)
        return calls

    return watch


@functools.cache
def plain_gradients(name):
    return loss_and_gradients(tiny_model(name), **make_batch())


UNEVEN = ["llama", "gemma2", "gpt-oss", "deepseek-v3"]  # each with another kind of attention


@pytest.mark.parametrize("recompute", slow_but_for([True], [False, True]), ids=["keep", "recompute"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loss_and_gradients_are_the_plain_models(name, recompute):
    model = tiny_model(name)
    assert apply_settings(model, tiny_settings(recompute=recompute)) is model
    assert_close(loss_and_gradients(model, **make_batch()), plain_gradients(name))


ON_SHARDS = [*((name, 2) for name in SHARDABLE), *((name, 3) for name in UNEVEN)]


@pytest.mark.parametrize("case", slow_but_for([*((name, 2) for name in UNEVEN), ("llama", 3)], ON_SHARDS), ids=str)
def test_on_shards_loss_and_gradients_add_up_to_the_plain_models(case):
    """Heads are unevenly shared by three ranks; the borders lie inside documents and windows."""
    name, sp_size = case
    batch = make_batch(30)
    plain = loss_and_gradients(tiny_model(name), **batch)
    assert_close(sharded_loss_and_gradients(tiny_model(name), batch, sp_size, recompute=sp_size == 2), plain)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma2", "mixtral"])
def test_kept_gate_and_up_change_no_bit(name, recompute):
    model, batch = tiny_model(name), make_batch()
    results = []
    for keep_mlp in (False, True):
        patched = apply_settings(copy.deepcopy(model), tiny_settings(recompute=recompute, keep_mlp=keep_mlp))
        results.append(loss_and_gradients(patched, **batch))
    again, kept = results
    assert again.keys() == kept.keys()
    assert all(torch.equal(again[name], kept[name]) for name in again)


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_the_plan_is_what_runs(count_calls, recompute):
    model = apply_settings(tiny_model("llama"), tiny_settings(mlp_chunks=5, loss_chunks=6, recompute=recompute))
    mlps, losses = (
        count_calls(mst_ds.structure.mlps, "chunked_mlp"),
        count_calls(mst_ds.patching.operators, "chunked_loss"),
    )
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


def test_frozen_parameters_get_no_gradient():
    """A trained head on a frozen body, and trained MLPs behind frozen embeddings."""
    for trained in ("lm_head", "mlp"):
        results = []
        for model in (tiny_model("llama"), apply_settings(tiny_model("llama"), tiny_settings(recompute=True))):
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(trained in name)
            results.append(loss_and_gradients(model, **make_batch()))
        plain, patched = results
        assert plain.keys() == patched.keys()
        assert len(plain) == 1 + (1 if trained == "lm_head" else 6)
        assert_close(patched, plain)


@pytest.mark.parametrize("name", slow_but_for(UNEVEN, ARCHITECTURES))
def test_removing_the_plan_restores_the_model_bit_for_bit(name):
    model, batch = tiny_model(name), make_batch()
    expected, before = loss_and_gradients(model, **batch), attributes(model)
    logits = model(input_ids=batch["input_ids"]).logits
    apply_settings(model, tiny_settings(recompute=True), zero_stage=3)
    loss_and_gradients(model, **batch)
    assert remove_plan(model) is model
    assert_untouched(model, before)
    actual = loss_and_gradients(model, **batch)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, logits)


@pytest.mark.parametrize("name", ["llama", "phi3-longrope", "mixtral", "gemma3"])
def test_removing_the_plan_of_a_shard_restores_the_config_and_its_attention(name):
    model = tiny_model(name)
    before, config = attributes(model), model.config
    # Nothing communicates before a forward, so any object will do for the group.
    apply_settings(model, tiny_settings(2, recompute=True), sequence_group=object())
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
    apply_settings(model, tiny_settings(recompute=True))
    remove_plan(model)
    assert_untouched(model, before)
    assert model.is_gradient_checkpointing


def test_a_plan_can_follow_another():
    model = tiny_model("llama")
    for chunks in (2, 7):
        apply_settings(model, tiny_settings(mlp_chunks=chunks, loss_chunks=chunks, recompute=True))
        assert_close(loss_and_gradients(model, **make_batch()), plain_gradients("llama"))
        remove_plan(model)


def test_another_instance_with_the_same_config_is_left_alone():
    model, batch = tiny_model("llama"), make_batch()
    other = type(model)(model.config).double()
    other.load_state_dict(model.state_dict())
    before, expected = attributes(other), loss_and_gradients(other, **batch)
    apply_settings(model, tiny_settings(2, recompute=True), sequence_group=object())
    assert_untouched(other, before)
    assert type(model) is type(other)
    assert other(**batch).logits.shape == (2, 29, 97)
    actual = loss_and_gradients(other, **batch)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_second_plan_is_refused_and_the_first_stays():
    model = apply_settings(tiny_model("llama"), tiny_settings())
    with pytest.raises(ValueError, match=r"has a plan already: call mst_ds.remove_plan\(model\) first"):
        apply_settings(model, tiny_settings())
    assert_close(loss_and_gradients(model, **make_batch()), plain_gradients("llama"))
    remove_plan(model)
    with pytest.raises(ValueError, match="the model has no plan"):
        remove_plan(model)


class WithAnotherLoss(MixtralForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = None if output.loss is None else 2 * output.loss
        return output


JET_MOE = {"num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2}
REFUSED = {
    "mlp": (JetMoeConfig, JetMoeForCausalLM, JET_MOE, {}, 'set "mlp_chunks": 1'),
    "loss": (MixtralConfig, WithAnotherLoss, {**GQA, **EXPERTS}, {}, "has a loss other than the cross-entropy"),
    "attention": (FalconConfig, FalconForCausalLM, {"alibi": True}, {"sp_size": 2}, "attention interface"),
}


@pytest.mark.parametrize(("config_class", "model_class", "settings", "plan", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_is_refused_is_not_changed(config_class, model_class, settings, plan, message):
    model = build(config_class, model_class, **settings)
    before = attributes(model)
    with pytest.raises(ValueError, match=message):
        apply_settings(model, tiny_settings(**plan))
    assert_untouched(model, before)


def test_a_model_keeps_experts_of_another_structure_where_one_chunk_is_planned():
    model = build(JetMoeConfig, JetMoeForCausalLM, **JET_MOE)
    plain = loss_and_gradients(model, **make_batch())
    forwards = [layer.mlp.forward for layer in model.model.layers]
    apply_settings(model, tiny_settings(mlp_chunks=1, recompute=True))
    assert [layer.mlp.forward for layer in model.model.layers] == forwards
    assert_close(loss_and_gradients(model, **make_batch()), plain)


@pytest.mark.parametrize("name", ["gpt2", "starcoder2"])
@pytest.mark.parametrize("attention", [0.0, 0.3], ids=["mlp", "mlp-and-attention"])
def test_dropout_draws_the_same_mask_in_the_recompute(name, attention):
    """With one plan and one seed the gradients are the same with and without recompute of the layers."""
    config_class, model_class, settings = ARCHITECTURES[name]
    drops = {"resid_pdrop": 0.3, "residual_dropout": 0.3, "attn_pdrop": attention, "attention_dropout": attention}
    results = []
    for recompute in (False, True):
        model = build(config_class, model_class, **{**settings, **drops})
        apply_settings(model, tiny_settings(recompute=recompute))
        for seed in (7, 8):
            torch.manual_seed(seed)
            results.append(loss_and_gradients(model, **make_batch()))
    assert_close(results[2], results[0])
    assert_close(results[3], results[1])
    assert abs(results[0]["loss"] - results[1]["loss"]) > 1e-4


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("name", "chunked"), [("llama", "mlp"), ("mixtral", "mlp.experts"), ("apertus", "mlp")])
def test_zero3_gathers_at_once_what_is_worked_through_in_chunks(name, chunked, recompute):
    """A whole layer, or, where layers are not computed again, an MLP."""
    from deepspeed.utils import z3_leaf_module

    model = tiny_model(name)
    modules = [layer if recompute else layer.get_submodule(chunked) for layer in model.model.layers]
    for stage in (2, 3):
        apply_settings(model, tiny_settings(recompute=recompute), zero_stage=stage)
        leaves = [module for module in model.modules() if z3_leaf_module(module)]
        assert leaves == (modules if stage == 3 else [])
        remove_plan(model)
        assert not any(z3_leaf_module(module) for module in model.modules())


def test_a_deep_copy_computes_with_its_own_weights_and_has_its_own_plan():
    model = apply_settings(tiny_llama(), tiny_settings())
    inputs = {"input_ids": torch.arange(16)[None], "labels": torch.arange(16)[None]}
    before = model(**inputs).loss
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert copied(**inputs).loss.item() == pytest.approx(math.log(VOCAB_SIZE))
    remove_plan(copied)
    assert copied(**inputs).logits.shape[-1] == VOCAB_SIZE
    assert torch.equal(model(**inputs).loss, before)
    assert isinstance(model(**inputs).logits, LogitsLeftOutByThePlan)


@pytest.mark.parametrize("name", ["phi3-longrope", "gpt2", "qwen3-moe", "deepseek-v3", "apertus"])
def test_a_deep_copy_of_every_kind_of_part_trains_by_itself(name):
    model, batch = tiny_model(name), make_batch()
    apply_settings(model, tiny_settings(recompute=True), zero_stage=3)
    copied = copy.deepcopy(model)
    assert_close(loss_and_gradients(copied, **batch), plain_gradients(name))
    assert all(parameter.grad is None for parameter in model.parameters())
    remove_plan(copied)
    assert_close(loss_and_gradients(copied, **batch), plain_gradients(name))
    assert isinstance(model(**batch).logits, LogitsLeftOutByThePlan)

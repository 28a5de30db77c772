"""What other code does to a model that has a plan: it is as without the plan, or it is refused."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
from accelerate import Accelerator
from plain_model import assert_close, loss_and_gradients, make_batch
from tiny import tiny_settings
from tiny_models import tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import Lfm2Config, Lfm2ForCausalLM

import mst_ds.patching.patched
from mst_ds import apply_settings, remove_plan

PATCHED = {"recompute": True}


def patched(name="llama", **settings):
    return apply_settings(tiny_model(name), tiny_settings(**{**PATCHED, **settings}))


def padded():
    batch = make_batch()
    mask = torch.ones_like(batch["input_ids"])
    mask[0, :6] = 0
    return {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("inner", [False, True], ids=["model", "decoder"])
def test_another_attention_is_refused_and_can_be_set_back(inner):
    model, batch = patched(), padded()
    expected = loss_and_gradients(patched(), **batch)
    (model.model if inner else model).set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"was set to 'sdpa' after mst_ds.apply_plan, .*'mst_ulysses'"):
        model(**batch)
    (model.model if inner else model).set_attn_implementation("mst_ulysses")
    assert_close(loss_and_gradients(model, **batch), expected, 0)


def test_another_config_is_refused():
    model = patched()
    model.model.config = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match=r"the config of LlamaModel was changed after mst_ds.apply_plan"):
        model(**make_batch())


SWITCHES = [
    lambda model: model.gradient_checkpointing_enable(),
    lambda model: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True}),
    lambda model: model.gradient_checkpointing_disable(),
    lambda model: model.model.gradient_checkpointing_enable(),
]


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
@pytest.mark.parametrize("switch", SWITCHES, ids=["on", "on-with-settings", "off", "decoder"])
def test_switches_of_recompute_leave_the_plans(switch, recompute):
    model, batch = patched(recompute=recompute), make_batch()
    before = [dict(layer.__dict__) for layer in model.model.layers]
    with pytest.warns(UserWarning, match=f'"recompute" in the "mst" block decides, and is {str(recompute).lower()}'):
        switch(model)
    assert [layer.__dict__ for layer in model.model.layers] == before
    model(**batch)
    remove_plan(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable()
    assert model.model.layers[0].gradient_checkpointing


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_recompute_that_was_on_before_a_plan_without_is_off_and_back_on():
    model = tiny_model("llama")
    model.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match='"recompute" in the "mst" block decides, and is false'):
        apply_settings(model, tiny_settings(recompute=False))
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)
    remove_plan(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)


def test_another_recompute_is_refused():
    model = patched()
    model.model.layers[1].gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"the recompute of LlamaDecoderLayer was changed after mst_ds.apply_plan"):
        model(**make_batch())


def test_generates_in_training_with_recompute():
    """A layer that is computed again takes the cache out of its arguments: every token would see itself alone."""
    ids = make_batch()["input_ids"][:, :12]
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = tiny_model("llama").train().generate(ids, **settings)
    model = patched().train()
    assert torch.equal(model.generate(ids, **settings), expected)
    assert_close(loss_and_gradients(model, **make_batch()), loss_and_gradients(patched(), **make_batch()), 0)


def under_autocast(model):
    return Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)


def test_autocast_of_accelerate_around_a_plan():
    batch = make_batch()
    expected = under_autocast(tiny_model("llama").float())(**batch).loss
    model = patched().float()
    plain = model(**batch).loss
    under_autocast(model)
    torch.testing.assert_close(model(**batch).loss, expected, rtol=1e-6, atol=0)
    assert abs(plain / expected - 1) > 1e-5
    with pytest.raises(ValueError, match=r"was wrapped after mst_ds.apply_plan, .* \(del model.forward\)"):
        remove_plan(model)
    Accelerator(mixed_precision="bf16", cpu=True).unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(model(batch["input_ids"], labels=batch["labels"]).loss, plain)
    remove_plan(model)
    assert "forward" not in model.__dict__


def test_a_plan_below_what_has_wrapped_the_model_is_refused():
    model = under_autocast(tiny_model("llama").float())
    with pytest.raises(ValueError, match=r"was replaced on this instance, .*: call mst_ds.apply_plan first"):
        apply_settings(model, tiny_settings())
    with pytest.raises(ValueError, match=r"and DataParallel is neither: call mst_ds.apply_plan before DeepSpeed, DDP"):
        apply_settings(torch.nn.DataParallel(tiny_model("llama")), tiny_settings())


def test_kernels_of_another_library_are_refused():
    model = patched()
    model.model.layers[1].mlp.forward = type(model.model.layers[1].mlp).forward.__get__(model.model.layers[1].mlp)
    with pytest.raises(ValueError, match=r"the forward of LlamaMLP was changed after mst_ds.apply_plan"):
        model(**make_batch())


def test_a_hook_that_would_not_run_is_refused():
    model = patched()
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)  # this one does
    model(**make_batch())
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"a linear layer of LlamaMLP was changed after mst_ds.apply_plan"):
        model(**make_batch())


def test_a_mixer_that_is_computed_again_without_its_documents_is_refused():
    torch.manual_seed(0)
    layer_types = ["conv", "full_attention"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Lfm2Config(vocab_size=97, num_hidden_layers=2, layer_types=layer_types, pad_token_id=0, **sizes)
    model = apply_settings(Lfm2ForCausalLM(config).double(), tiny_settings(mlp_chunks=1, recompute=False))
    layer = model.model.layers[0]
    layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    loss = model(**make_batch(24), position_ids=torch.arange(24).remainder(7).expand(2, -1)).loss
    with pytest.raises(ValueError, match=r"^Lfm2ShortConv runs outside the forward of a patched decoder"):
        loss.backward()


def test_a_decoder_that_lost_its_forward_is_refused():
    model = patched()
    model.model.forward = type(model.model).forward.__get__(model.model)
    with pytest.raises(ValueError, match=r"the forward of its decoder was replaced after mst_ds.apply_plan"):
        model(**make_batch())


def test_what_is_set_in_the_config_stays_when_the_plan_goes():
    model = tiny_model("llama")
    config, attention = model.config, model.config._attn_implementation
    apply_settings(model, tiny_settings())
    model.config.pad_token_id = 5
    model.resize_token_embeddings(120, mean_resizing=False)
    with pytest.raises(ValueError, match=r"the LM head was changed after mst_ds.apply_plan, such as by .* new tokens"):
        model(**make_batch())
    remove_plan(model)
    assert model.config is config
    assert (config.pad_token_id, config.vocab_size, config._attn_implementation) == (5, 120, attention)


def test_a_router_loss_that_is_switched_on_later():
    model, plain = patched("mixtral"), tiny_model("mixtral")
    for each in (model, plain):
        each.config.output_router_logits, each.router_aux_loss_coef = True, 0.5
    outcomes = [loss_and_gradients(each, **make_batch()) for each in (model, plain)]
    assert_close(*outcomes)
    without_one = patched()
    without_one.config.output_router_logits = True
    with pytest.raises(ValueError, match=r"has no router loss that mst_ds knows"):
        without_one(**make_batch())


def test_a_copied_forward_has_one_code_and_one_dict_of_globals():
    """torch.compile puts what it has made of a code among its globals, and looks for it there by the code: with a dict
    for each layer, or the class's code, that is a NameError in the second."""
    attentions = [layer.self_attn for model in (patched(), patched()) for layer in model.model.layers]
    assert len({attention.forward.__func__ for attention in attentions}) == 1
    assert attentions[0].forward.__code__ is not type(attentions[0]).forward.__code__
    assert attentions[0].forward.__globals__ is not type(attentions[0]).forward.__globals__


def test_a_pickled_model_has_its_plan(monkeypatch):
    registered = []
    monkeypatch.setattr(mst_ds.patching.patched, "register_attention", lambda: registered.append(1))
    model = pickle.loads(pickle.dumps(patched()))
    assert registered, "another process has no such attention yet"
    assert_close(loss_and_gradients(model, **make_batch()), loss_and_gradients(patched(), **make_batch()), 0)
    remove_plan(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_and_other_weights(dtype):
    model, plain = patched().to(dtype), apply_settings(tiny_model("llama").to(dtype), tiny_settings(**PATCHED))
    assert_close(loss_and_gradients(model, **make_batch()), loss_and_gradients(plain, **make_batch()), 0)
    weights = {name: 1.1 * parameter.detach() for name, parameter in plain.named_parameters()}
    called = torch.func.functional_call(model, weights, (), make_batch()).loss
    plain.load_state_dict(weights)
    assert torch.equal(called, plain(**make_batch()).loss)

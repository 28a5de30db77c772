"""Models that write attention out, with a plan: exact, packed, sharded and in chunks, and as they were without it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from tiers import slow_but_for
from tiny import tiny_settings
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.gptj.modeling_gptj import GPTJAttention

from mst_ds import apply_settings, remove_plan
from mst_ds.eager_attention import EAGER_ATTENTION_NAME
from mst_ds.memory.live import LiveMemory
from mst_ds.preflight import Case, check_model
from mst_ds.settings import Settings
from mst_ds.structure import decoder_layers, find_eager_attention, why_own_attention

VOCAB = 61
SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2}
# Learned positions and rotary ones, biases of positions, a window in a buffer, masks in a buffer and of transformers;
# the last two have no layers that transformers computes again.
MODELS: dict[str, dict[str, Any]] = {
    "bloom": SIZES,
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "rotary_dim": 4},
    "falcon": SIZES | {"new_decoder_architecture": True, "num_kv_heads": 3},
    "gpt_neo": {"hidden_size": 24, "num_heads": 3, "attention_types": [[["global", "local"], 1]], "num_layers": 2}
    | {"window_size": 5},
    "gptj": {"n_embd": 24, "n_head": 3, "n_layer": 2, "rotary_dim": 4},
    "mpt": {"d_model": 24, "n_heads": 3, "n_layers": 2, "max_seq_len": 4096},
    "xglm": {"d_model": 24, "attention_heads": 3, "num_layers": 2, "ffn_dim": 32},
    "gpt_neox_japanese": SIZES,
    "openai-gpt": {"n_embd": 24, "n_head": 3, "n_layer": 2},
}
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop")
QUICK = ("bloom", "gpt_neo", "openai-gpt")
EXACT = 1e-11
CHUNKED = Settings(sp_size=2, layer_chunks=4, loss_chunks=4, recompute=True, keep_attention=True)


def config_of(name: str, **values: Any) -> Any:
    config = AutoConfig.for_model(name, **SPECIAL | MODELS[name] | values)
    for dropout in (*DROPOUTS, "embed_dropout", "resid_dropout", "resid_pdrop", "layerdrop"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return config


def model_of(name: str, **values: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name, **values), attn_implementation="eager").train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("name", slow_but_for(QUICK, MODELS))
def test_they_are_exact(name: str) -> None:
    """Packed on two ranks, where each layer is a stream of chunks, and whole layers of padded rows."""
    report = check_model(config_of(name), [Case(CHUNKED, packed=True), Case(Settings(), packed=False)])
    assert report.is_exact, report.verdict
    for check in report.checks:
        assert check.gradient_error is not None
        assert check.gradient_error < EXACT


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_found_and_nothing_else(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    layers = decoder_layers(model)
    found = [attention.module for attention in find_eager_attention(model)]
    assert len(layers) == len(found) == 2
    assert why_own_attention(model) is None
    for layer, module in zip(layers, found, strict=True):
        assert module in list(layer.modules())
        assert "attention" in type(module).__name__.lower()


class Capped(GPTJAttention):
    """With a softcap, which nobody here knows in scores that are written out."""

    def _attn(self, query: Any, key: Any, value: Any, attention_mask: Any = None) -> Any:
        scores = (query @ key.mT / self.scale_attn).tanh() + attention_mask
        weights = torch.softmax(scores, dim=-1)
        return weights @ value, weights


def test_a_model_whose_scores_are_not_understood_keeps_its_attention() -> None:
    model: Any = model_of("gptj")
    model.transformer.h[1].attn.__class__ = Capped
    assert find_eager_attention(model) == []
    ids = torch.randint(3, VOCAB, (2, 13))
    expected = gradients(copy.deepcopy(model), ids)
    torch.testing.assert_close(gradients(apply_settings(model, tiny_settings()), ids), expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"does not use transformers' attention interface, .* use sp_size 1"):
        apply_settings(remove_plan(model), tiny_settings(2), sequence_group=object())


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_generation_is_their_own_and_so_is_all_without_the_plan(name: str) -> None:
    model = model_of(name).eval()
    ids = torch.randint(3, VOCAB, (2, 11))
    plain = copy.deepcopy(model)
    expected, logits = plain.generate(ids, max_new_tokens=5, do_sample=False), plain(ids).logits
    planned: Any = apply_settings(model, tiny_settings(mlp_chunks=1, recompute=True))
    assert torch.equal(planned.generate(ids, max_new_tokens=5, do_sample=False), expected)
    assert planned.config._attn_implementation == EAGER_ATTENTION_NAME
    remove_plan(planned)
    assert torch.equal(planned(ids).logits, logits)


def gradients(model: Any, ids: torch.Tensor) -> torch.Tensor:
    model(input_ids=ids, labels=ids).loss.backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])


def test_16_bits_cost_less_than_by_the_models_own_attention() -> None:
    """BLOOM adds biases of up to hundreds to scores of 16 bits; here they are sums of exact parts."""
    model, ids = model_of("bloom", hidden_size=48, num_attention_heads=12), torch.randint(3, VOCAB, (1, 700))
    truth = gradients(copy.deepcopy(model).double(), ids)
    own = copy.deepcopy(model).bfloat16()
    planned = apply_settings(copy.deepcopy(own), tiny_settings(mlp_chunks=1, recompute=True, layer_chunks=4))
    errors = [float((gradients(each, ids) - truth).norm() / truth.norm()) for each in (planned, own)]
    assert errors[0] < 0.03 < errors[1]


@pytest.mark.parametrize("name", QUICK)
def test_a_step_has_no_tensor_of_all_tokens_to_all(name: str) -> None:
    """In both passes, alive at once, less than the scores of one head."""
    length = 2048 if name != "openai-gpt" else 512
    model: Any = apply_settings(
        model_of(name), tiny_settings(mlp_chunks=1, recompute=True, layer_chunks=8, loss_chunks=8)
    )
    step = functools.partial(gradients, model, torch.randint(3, VOCAB, (1, length)))
    step()  # the first looks at buffers
    model.zero_grad(set_to_none=True)
    with LiveMemory() as memory:
        step()
    assert 0 < memory.peak < length * length * 4

"""How a model gets from its decoder to its loss: found for what it computes, or refused."""

import pytest
import torch
from plain_model import assert_close, loss_and_gradients, make_batch
from tiny import tiny_settings
from tiny_models import ARCHITECTURES, EXPERTS, GQA, build, tiny_model
from torch import nn
from transformers import (
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
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from mst_ds import apply_settings
from mst_ds.structure import RouterLoss, loss_structure

# Scale and softcap of the logits, and the router loss.
TRANSFORMS = {"gemma2": (1.0, 3.0), "cohere": (0.0625, None), "granite": (0.125, None)}
ROUTERS = {"mixtral", "qwen3-moe", "olmoe", "gpt-oss"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_finds_decoder_head_logits_and_router(name):
    model = tiny_model(name)
    structure = loss_structure(model)
    assert structure.decoder is model.base_model
    assert structure.head is model.get_output_embeddings()
    assert structure.is_linear
    scale, softcap = TRANSFORMS.get(name, (1.0, None))
    assert structure.logit_scale == pytest.approx(scale, rel=1e-12)
    assert structure.logit_softcap == (None if softcap is None else pytest.approx(softcap, rel=1e-12))
    assert (structure.router is None) == (name not in ROUTERS)
    assert not structure.router_is_on
    if structure.router is not None:
        assert structure.router.top_k == 2
        assert structure.router.coefficient == model.router_aux_loss_coef


def test_a_scale_of_one_is_none_at_all():
    model = build(GraniteConfig, GraniteForCausalLM, **GQA, logits_scaling=1.0)
    assert loss_structure(model).logit_scale == 1


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1000.0])
def test_a_softcap_is_measured_however_wide(softcap):
    model = build(Gemma2Config, Gemma2ForCausalLM, **GQA, head_dim=8, final_logit_softcapping=softcap)
    assert loss_structure(model).logit_softcap == pytest.approx(softcap, rel=1e-12)


@pytest.mark.parametrize("coefficient", [0.0, 1.0, 1e-9, 0.02])
def test_a_router_loss_is_confirmed_whatever_its_weight(coefficient):
    settings = {**GQA, **EXPERTS, "output_router_logits": True, "router_aux_loss_coef": coefficient}
    structure = loss_structure(build(MixtralConfig, MixtralForCausalLM, **settings))
    assert structure.router == RouterLoss(coefficient, 2)
    assert structure.router_is_on


class WithAnotherRouterLoss(MixtralForCausalLM):
    """Adds what no other mixture adds."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        if output.loss is not None and kwargs.get("output_router_logits", self.config.output_router_logits):
            output.loss = output.loss + 1e-3 * sum(
                logits.logsumexp(-1).square().mean() for logits in output.router_logits
            )
        return output


def test_another_router_loss_is_refused_if_it_is_on():
    settings = {**GQA, **EXPERTS}
    with pytest.raises(
        ValueError, match=r"WithAnotherRouterLoss has a loss other .* set output_router_logits to false"
    ):
        loss_structure(build(MixtralConfig, WithAnotherRouterLoss, **settings, output_router_logits=True))
    assert loss_structure(build(MixtralConfig, WithAnotherRouterLoss, **settings)).router is None


def test_a_flag_that_a_model_does_not_know_means_nothing():
    structure = loss_structure(build(LlamaConfig, LlamaForCausalLM, **GQA, output_router_logits=True))
    assert structure.router is None
    assert not structure.router_is_on


class Changed(LlamaForCausalLM):
    """Llama with a place to change each step of its forward."""

    def before(self, input_ids):
        return input_ids

    def between(self, hidden_states):
        return hidden_states

    def after(self, logits):
        return logits

    def loss_of(self, logits, labels, outputs, **kwargs):
        return self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = self.model(input_ids=self.before(input_ids), attention_mask=attention_mask, **kwargs)
        logits = self.after(self.lm_head(self.between(outputs.last_hidden_state)))
        loss = None if labels is None else self.loss_of(logits, labels, outputs, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class ShiftsItsInput(Changed):
    def before(self, input_ids):
        return (input_ids + 1) % self.config.vocab_size


class ScalesHiddenStates(Changed):
    """As MiniCPM and tied T5 heads do."""

    def between(self, hidden_states):
        return hidden_states * 0.375


class ScalesSomeHiddenStates(Changed):
    def between(self, hidden_states):
        return torch.cat([hidden_states[..., :-1] * 0.5, hidden_states[..., -1:]], dim=-1)


class PassesBy(LlamaModel):
    """As OPT does: it calls a model inside, and so does the causal language model around it."""

    def __init__(self, config):
        super().__init__(config)
        self.decoder = LlamaModel(config)
        del self.layers, self.embed_tokens, self.norm, self.rotary_emb

    def get_input_embeddings(self):
        return self.decoder.embed_tokens

    def forward(self, *args, **kwargs):
        return self.decoder(*args, **kwargs)


class CallsTheDecoderInside(Changed):
    def __init__(self, config):
        super().__init__(config)
        self.model = PassesBy(config)

    def forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
        outputs = self.model.decoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None if labels is None else self.loss_of(logits, labels, outputs, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits)


class NamesNoDecoder(Changed):
    """As Llama 4's does, whose prefix names nothing."""

    base_model_prefix = "language_model"


class StopsTheGradient(Changed):
    def between(self, hidden_states):
        return hidden_states.detach()


class ReversesTokens(Changed):
    def between(self, hidden_states):
        return hidden_states.flip(1)


class ShiftsLogits(Changed):
    def after(self, logits):
        return logits + 1


class MasksPaddedVocabulary(Changed):
    def after(self, logits):
        return logits.masked_fill(torch.arange(logits.shape[-1]) == self.config.vocab_size - 1, -1e9)


class ClampsLogits(Changed):
    def after(self, logits):
        return logits.clamp(-50, 50)


class SoftmaxesLogits(Changed):
    def after(self, logits):
        return logits.log_softmax(-1)


class AddsToItsLoss(Changed):
    def loss_of(self, logits, labels, outputs, **kwargs):
        return super().loss_of(logits, labels, outputs, **kwargs) + 1e-4 * logits.logsumexp(-1).square().mean()


class AddsWhatItsDecoderReturns(Changed):
    def loss_of(self, logits, labels, outputs, **kwargs):
        aux_loss = getattr(outputs, "aux_loss", None)
        return super().loss_of(logits, labels, outputs, **kwargs) + (0 if aux_loss is None else aux_loss)


class DoesNotShift(Changed):
    def loss_of(self, logits, labels, outputs, **kwargs):
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


class SmoothesLabels(Changed):
    def loss_of(self, logits, labels, outputs, **kwargs):
        shifted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return nn.functional.cross_entropy(shifted, targets, label_smoothing=0.1)


class CutsTheGradientOfItsLoss(Changed):
    """The same value, half the gradient."""

    def loss_of(self, logits, labels, outputs, **kwargs):
        loss = super().loss_of(logits, labels, outputs, **kwargs)
        return (loss + loss.detach()) / 2


CHANGES = {
    ShiftsItsInput: "changes its input before its decoder",
    ScalesSomeHiddenStates: "changes its decoder's hidden states before its LM head",
    StopsTheGradient: "changes its decoder's hidden states before its LM head",
    ReversesTokens: "changes its decoder's hidden states before its LM head",
    ShiftsLogits: "does more to its logits",
    MasksPaddedVocabulary: "does more to its logits",
    ClampsLogits: "does more to its logits",
    SoftmaxesLogits: "does more to its logits",
    AddsToItsLoss: "has a loss other than the cross-entropy",
    AddsWhatItsDecoderReturns: "has a loss other than the cross-entropy",
    DoesNotShift: "has a loss other than the cross-entropy",
    SmoothesLabels: "has a loss other than the cross-entropy",
    CutsTheGradientOfItsLoss: "has a loss other than the cross-entropy",
}


@pytest.mark.parametrize(("model_class", "message"), CHANGES.items(), ids=[change.__name__ for change in CHANGES])
def test_a_forward_that_does_more_is_refused(model_class, message):
    model = build(LlamaConfig, model_class, **GQA)
    with pytest.raises(ValueError, match=f"^{model_class.__name__} {message}"):
        loss_structure(model)
    with pytest.raises(ValueError, match=message):
        apply_settings(model, tiny_settings())


def test_a_decoder_is_the_one_that_the_forward_calls():
    inside, unnamed = (build(LlamaConfig, change, **GQA) for change in (CallsTheDecoderInside, NamesNoDecoder))
    assert loss_structure(inside).decoder is inside.model.decoder
    assert loss_structure(unnamed).decoder is unnamed.model


def test_a_decoder_inside_keeps_its_own_mode():
    model = build(LlamaConfig, CallsTheDecoderInside, **GQA).train()
    model.model.decoder.eval()
    loss_structure(model)
    assert not model.model.decoder.training


@pytest.mark.parametrize("model_class", [ScalesHiddenStates, CallsTheDecoderInside, NamesNoDecoder])
def test_another_way_to_the_head_is_exact(model_class):
    model = build(LlamaConfig, model_class, **GQA)
    batch = make_batch()
    plain = loss_and_gradients(model, **batch)
    apply_settings(model, tiny_settings())
    assert_close(loss_and_gradients(model, **batch), plain)


def test_the_refusal_is_of_the_computation_not_of_the_class():
    assert loss_structure(build(LlamaConfig, Changed, **GQA)).is_linear


@pytest.mark.parametrize(
    ("config_class", "model_class", "settings", "message"),
    [
        (LlamaConfig, LlamaModel, {}, "is no causal language model with an LM head"),
        (LlamaConfig, LlamaForSequenceClassification, {}, "is no causal language model with an LM head"),
    ],
    ids=["llama-body", "llama-classifier"],
)
def test_refuses_what_is_no_causal_language_model_of_a_known_form(config_class, model_class, settings, message):
    with pytest.raises(ValueError, match=f"^{model_class.__name__} {message}"):
        loss_structure(build(config_class, model_class, **settings))


def test_refuses_a_loss_function_that_the_user_changed():
    model = tiny_model("llama")
    model.loss_function = lambda logits, labels, **kwargs: logits.mean()
    with pytest.raises(ValueError, match="has a loss_function of its own"):
        loss_structure(model)


class AdaptedHead(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.weight = base, base.weight
        self.a, self.b = nn.Linear(32, 4, bias=False).double(), nn.Linear(4, 97, bias=False).double()

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class MixingHead(AdaptedHead):
    def forward(self, x):
        return super().forward(x) + x.mean(1, keepdim=True).sum(-1, keepdim=True)


def with_head(change):
    model = tiny_model("llama")
    model.lm_head = change(model.lm_head)
    return model


def hooked(head):
    head.register_forward_hook(lambda module, args, output: output * 2)
    return head


def with_own_forward(head):
    original = head.forward
    head.forward = lambda x: 2 * original(x)
    return head


def test_a_head_with_an_adapter_is_taken_as_it_is():
    model = with_head(AdaptedHead)
    structure = loss_structure(model)
    assert structure.head is model.lm_head
    assert not structure.is_linear
    ids = torch.arange(3, 33)[None]
    results = []
    for patched in (False, True):
        if patched:
            apply_settings(model, tiny_settings())
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    # transformers computes the loss in fp32.
    assert all((a - b).norm() <= 1e-6 * b.norm() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("change", [MixingHead, hooked, with_own_forward])
def test_a_head_that_mixes_tokens_or_is_changed_is_refused(change):
    with pytest.raises(ValueError, match="has an LM head that mst_ds cannot chunk: it has hooks, or mixes tokens"):
        loss_structure(with_head(change))

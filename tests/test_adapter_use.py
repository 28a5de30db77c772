"""What users do to a model with adapters that has a plan: it is as without the plan, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from adapted import (
    ATTENTION,
    EMBEDDINGS,
    EXPERTS,
    HEAD,
    MLP,
    Adapter,
    adapted,
    base_model,
    lora,
    randomise,
)
from peft import PeftModel, get_peft_model
from plain_model import TOLERANCE, assert_close, loss_and_gradients, make_batch
from steps import patched_step
from tiny import tiny_settings
from torch import Tensor, nn
from transformers import PreTrainedModel

from mst_ds import apply_settings, remove_plan

SEVERAL = {"target_modules": [*ATTENTION, *MLP, *HEAD], "modules_to_save": EMBEDDINGS}


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, Tensor]:
    """The loss, and the logits without labels."""
    batch = make_batch(30)
    return {"loss": model(**batch).loss, "logits": model(input_ids=batch["input_ids"]).logits}


def disable(model: PeftModel) -> list[dict[str, Tensor]]:
    with model.disable_adapter():
        without = evaluate(model)
    return [without, loss_and_gradients(model, **make_batch(30))]


def merge(model: PeftModel) -> list[dict[str, Tensor]]:
    model.merge_adapter()
    merged = evaluate(model)
    model.unmerge_adapter()
    return [merged, loss_and_gradients(model, **make_batch(30))]


def change_adapters(model: PeftModel) -> list[dict[str, Tensor]]:
    model.add_adapter("second", lora(r=2, target_modules=[*ATTENTION, *MLP, *HEAD]))
    first = loss_and_gradients(model, **make_batch(30))
    model.set_adapter("second")
    randomise(model)
    second = loss_and_gradients(model, **make_batch(30))
    model.delete_adapter("default")
    return [first, second, loss_and_gradients(model, **make_batch(30))]


def save(model: PeftModel) -> list[dict[str, Tensor]]:
    return [peft.get_peft_model_state_dict(model)]


def generate(model: PeftModel) -> list[dict[str, Tensor]]:
    model.eval()
    ids = make_batch(30)["input_ids"][:, :5]
    return [{"ids": model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).double()}]


@pytest.mark.parametrize("use", [disable, merge, change_adapters, save, generate])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_an_adapter_is_used_as_without_a_plan(
    use: Callable[[PeftModel], list[dict[str, Tensor]]], recompute: bool
) -> None:
    plain = use(adapted("llama", SEVERAL))
    patched = use(apply_settings(adapted("llama", SEVERAL), tiny_settings(recompute=recompute)))
    for actual, expected in zip(patched, plain, strict=True):
        assert_close(actual, expected)


def test_a_model_merged_and_unloaded_under_its_plan() -> None:
    plain, model = (adapted("llama", SEVERAL) for _ in range(2))
    apply_settings(model, tiny_settings())
    plain, model = plain.merge_and_unload(), model.merge_and_unload()
    ids = make_batch(30)["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=TOLERANCE, atol=TOLERANCE)
    # The plan's head is not the model's any more.
    with pytest.raises(ValueError, match=r"LM head was changed after mst_ds.apply_plan.*remove_plan\(model\)"):
        model(**make_batch(30))
    remove_plan(model)
    apply_settings(model, tiny_settings())
    for merged in (plain, model):
        merged.requires_grad_(True)
    assert_close(loss_and_gradients(model, **make_batch(30)), loss_and_gradients(plain, **make_batch(30)))


def test_another_adapter_between_forward_and_backward_is_refused() -> None:
    # The backward would compute again with the other adapter.
    model = apply_settings(adapted("llama", SEVERAL), tiny_settings())
    model.add_adapter("second", lora(target_modules=MLP))
    loss = model(**make_batch(30)).loss
    model.set_adapter("second")
    with pytest.raises(ValueError, match="which parameters are trained was changed between forward and backward"):
        loss.backward()
    model.set_adapter("default")
    model(**make_batch(30)).loss.backward()


def by_peft(adapter: Adapter, model: PreTrainedModel) -> nn.Module:
    return get_peft_model(model, lora(**adapter))


def by_transformers(adapter: Adapter, model: PreTrainedModel) -> nn.Module:
    model.add_adapter(lora(**adapter))
    return model


@pytest.mark.parametrize(
    ("architecture", "adapter", "changed", "add"),
    [
        ("llama", {"target_modules": ATTENTION}, None, by_peft),
        ("llama", {"target_modules": EMBEDDINGS}, None, by_peft),
        ("llama", {"target_modules": MLP}, "LlamaMLP", by_peft),
        ("llama", {"target_modules": ["down_proj"]}, "LlamaMLP", by_transformers),
        ("llama", {"target_modules": HEAD}, "the LM head", by_peft),
        ("llama", {"target_modules": HEAD}, "the LM head", by_transformers),
        ("qwen3-moe", {"target_modules": ATTENTION, "target_parameters": EXPERTS}, None, by_peft),
    ],
)
def test_an_adapter_added_after_the_plan_trains_or_is_refused(
    architecture: str, adapter: Adapter, changed: str | None, add: Callable[[Adapter, PreTrainedModel], nn.Module]
) -> None:
    plain, patched = base_model(architecture), apply_settings(base_model(architecture), tiny_settings())
    models = []
    for base in (plain, patched):
        torch.manual_seed(1)
        models.append(add(adapter, base))
        randomise(models[-1])
    plain, model = models
    if changed is not None:
        with pytest.raises(ValueError, match=rf"^{changed} was changed after mst_ds.apply_plan") as error:
            model(**make_batch(30))
        assert "\n" not in str(error.value)
        remove_plan(model)
        apply_settings(model, tiny_settings())
    assert_close(loss_and_gradients(model, **make_batch(30)), loss_and_gradients(plain, **make_batch(30)))


@pytest.mark.parametrize("head", [None, nn.Linear(32, 97, bias=False, dtype=torch.float64)], ids=["resized", "new"])
def test_a_head_replaced_under_the_plan_is_refused(head: nn.Module | None) -> None:
    model = apply_settings(base_model("llama"), tiny_settings())
    if head is None:
        model.resize_token_embeddings(105, mean_resizing=False)
    else:
        model.set_output_embeddings(head)
    with pytest.raises(ValueError, match="the LM head was changed"):
        model(**make_batch(30))


# What is adapted beside layers, or beside a layer's output


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=8),
    ],
    ids=["prompt", "prompt-encoder"],
)
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_learned_prompt_trains_without_shards(config: peft.PeftConfig, with_mask: bool) -> None:
    batch = make_batch(30)
    if with_mask:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model = get_peft_model(base_model("llama"), copy.deepcopy(config))
    assert_close(patched_step(model, batch), loss_and_gradients(model, **batch))


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_learned_prompt_is_refused_on_shards(name: str) -> None:
    model = get_peft_model(base_model("llama"), getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(ValueError, match=r"learns a prompt puts it before the sequence.*: use sp_size 1$"):
        apply_settings(model, tiny_settings(2), sequence_group=object())


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_a_learned_prefix_is_refused(recompute: bool) -> None:
    # With recompute transformers drops the prefix without a word.
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = apply_settings(get_peft_model(base_model("llama"), config), tiny_settings(recompute=recompute))
    with pytest.raises(ValueError, match="past_key_values, such as a learned prefix, cannot be trained with a plan"):
        model(**make_batch(30))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(target_modules=MLP, alora_invocation_tokens=[5]), "an activated LoRA adapts the tokens after"),
        (
            peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=MLP, total_step=10),
            "AdaLoraModel does more than adapt layers, such as add to the loss",
        ),
    ],
    ids=["activated", "adds-to-the-loss"],
)
def test_an_adapter_of_more_than_layers_is_refused(config: peft.PeftConfig, message: str) -> None:
    model = get_peft_model(base_model("llama"), config)
    with pytest.raises(ValueError, match=message):
        apply_settings(model, tiny_settings(mlp_chunks=1))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("mlp.up_proj.weight", 'no MLP that can be chunked exactly.*set "mlp_chunks": 1'),
        ("lm_head.weight", "an LM head"),
    ],
)
def test_an_adapter_of_a_weight_outside_of_experts_is_refused(weight: str, message: str) -> None:
    model = adapted("llama", {"target_modules": ATTENTION, "target_parameters": [weight]})
    with pytest.raises(ValueError, match=message):
        apply_settings(model, tiny_settings())

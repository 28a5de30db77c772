"""Adapters of peft under a plan: loss and every gradient are those of the peft model without one."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from distributed import run_ranks
from peft import LoraConfig, PeftModel, get_peft_model
from steps import (
    assert_close,
    build_engine,
    loss_and_gradients,
    plain_steps,
    relative_errors,
    simulated_step,
    train,
    zero_block,
)
from tiny import Outcome, samples, tiny_llama, tiny_plan
from tiny_models import ARCHITECTURES, build
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mst_ds import apply_plan, remove_plan
from mst_ds.data import IGNORE_INDEX, Batch, shard
from mst_ds.topology import Topology
from mst_ds.ulysses import ProcessSequenceGroup

# fp64, but transformers computes norms, rotary embeddings and the loss in fp32 in any model.
TOLERANCE = 1e-6
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
HEAD, EMBEDDINGS = ["lm_head"], ["embed_tokens"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

Adapter = dict[str, Any]
ADAPTERS: dict[str, tuple[str, Adapter]] = {
    "attention": ("llama", {"target_modules": ATTENTION}),
    "mlp": ("llama", {"target_modules": MLP}),
    "down": ("llama", {"target_modules": ["down_proj"]}),
    "all-linear": ("llama", {"target_modules": "all-linear"}),
    "head": ("llama", {"target_modules": HEAD}),
    "embeddings": ("llama", {"target_modules": EMBEDDINGS}),
    "everything": ("llama", {"target_modules": [*ATTENTION, *MLP, *HEAD, *EMBEDDINGS]}),
    "saved-head": ("llama", {"target_modules": ATTENTION, "modules_to_save": HEAD}),
    "saved-head-and-embeddings": ("llama", {"target_modules": MLP, "modules_to_save": [*EMBEDDINGS, *HEAD]}),
    "saved-mlp": ("llama", {"target_modules": ATTENTION, "modules_to_save": ["mlp"]}),
    "trained-tokens": ("llama", {"target_modules": ATTENTION, "trainable_token_indices": [5, 6, 7]}),
    "rslora": ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", {"target_modules": [*ATTENTION, *MLP, *HEAD], "use_dora": True}),
    "biases": ("llama-bias-tied", {"target_modules": [*ATTENTION, *MLP], "bias": "all"}),
    "lora-bias": ("llama", {"target_modules": [*MLP, *HEAD], "lora_bias": True}),
    "tied-head": ("llama-bias-tied", {"target_modules": [*MLP, *HEAD]}),
    "tied-embeddings": ("llama-bias-tied", {"target_modules": EMBEDDINGS}),
    "tied-both": ("llama-bias-tied", {"target_modules": [*MLP, *HEAD], "ensure_weight_tying": True}),
    "tied-saved": (
        "llama-bias-tied",
        {"target_modules": ATTENTION, "modules_to_save": EMBEDDINGS, "ensure_weight_tying": True},
    ),
    "fused-gate": ("phi3", {"target_modules": "all-linear"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "moe-attention": ("qwen3-moe", {"target_modules": ATTENTION}),
    "moe-router": ("qwen3-moe", {"target_modules": ["gate"]}),
    "moe-saved-router": ("qwen3-moe", {"target_modules": ATTENTION, "modules_to_save": ["gate"]}),
    "moe-saved-experts": ("qwen3-moe", {"target_modules": ATTENTION, "modules_to_save": ["experts"]}),
    "moe-experts": ("qwen3-moe", {"target_modules": ["gate"], "target_parameters": EXPERTS}),
    "moe-everything": ("mixtral", {"target_modules": "all-linear", "target_parameters": EXPERTS}),
}
# peft adds to a weight within a context that is one for all threads: such adapters meet others in processes only.
NEEDS_PROCESSES = [name for name, (_, adapter) in ADAPTERS.items() if "target_parameters" in adapter]


def base_model(architecture: str) -> PreTrainedModel:
    config_class, model_class, settings = ARCHITECTURES[architecture]
    has_experts = "num_experts_per_tok" in settings
    return build(config_class, model_class, **{**settings, **({"output_router_logits": True} if has_experts else {})})


def adapted(architecture: str, adapter: Adapter) -> PeftModel:
    """The same model each time. No adapter is without effect, as those newly made are."""
    torch.manual_seed(1)
    model = get_peft_model(base_model(architecture), lora(**adapter))
    randomise(model)
    return model


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **copy.deepcopy(settings)})


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(noise.to(parameter.dtype), alpha=0.1)


def make_batch(batch_size: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (batch_size, 30), generator=generator)
    labels = ids.clone()
    labels[0, 5:9] = IGNORE_INDEX
    labels[-1, :20] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


@functools.cache
def plain_step(name: str) -> dict[str, Tensor]:
    model = adapted(*ADAPTERS[name])
    result = loss_and_gradients(model, **make_batch())
    trained = {parameter_name for parameter_name, parameter in model.named_parameters() if parameter.requires_grad}
    assert result.keys() == {"loss", *trained}
    return result


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trains_as_without_a_plan(name: str) -> None:
    model = adapted(*ADAPTERS[name])
    assert apply_plan(model, tiny_plan(recompute=False)) is model
    assert_close(loss_and_gradients(model, **make_batch()), plain_step(name), TOLERANCE)
    remove_plan(model)
    removed = loss_and_gradients(model, **make_batch())
    assert all(torch.equal(removed[key], value) for key, value in plain_step(name).items())


@pytest.mark.parametrize("name", ["everything", "saved-head-and-embeddings", "moe-everything"])
def test_an_adapter_trains_with_recompute_as_without_a_plan(name: str) -> None:
    model = apply_plan(adapted(*ADAPTERS[name]), tiny_plan(recompute=True))
    assert_close(loss_and_gradients(model, **make_batch()), plain_step(name), TOLERANCE)


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in NEEDS_PROCESSES])
def test_an_adapter_trains_on_shards_as_without(name: str) -> None:
    models = [adapted(*ADAPTERS[name]) for _ in range(2)]
    assert_close(simulated_step(models, make_batch(), recompute=True), plain_step(name), TOLERANCE)


def step_in_processes(rank: int, names: list[str]) -> list[dict[str, Tensor]]:
    topology, batch = Topology(rank, 2, 2), make_batch()
    num_items = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    results = []
    for name in names:
        model = adapted(*ADAPTERS[name])
        plan = tiny_plan(topology, 30, recompute=True, mlp_chunks=2 + rank)
        apply_plan(model, plan, sequence_group=ProcessSequenceGroup(dist.group.WORLD))
        step = loss_and_gradients(model, **shard(batch, topology), num_items_in_batch=num_items)
        for tensor in step.values():
            dist.all_reduce(tensor)
        results.append(step)
    return results


def test_adapters_of_weights_train_on_shards_as_without() -> None:
    results, _ = run_ranks(step_in_processes, 2, NEEDS_PROCESSES)
    for name, result in zip(NEEDS_PROCESSES, results, strict=True):
        assert_close(result, plain_step(name), TOLERANCE)


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
        apply_plan(model, tiny_plan())


def test_a_trained_head_on_a_frozen_body_without_peft() -> None:
    results = []
    for plan in (None, tiny_plan()):
        model = base_model("llama").requires_grad_(False)
        model.lm_head.requires_grad_(True)
        if plan is not None:
            apply_plan(model, plan)
        results.append(loss_and_gradients(model, **make_batch()))
    plain, patched = results
    assert plain.keys() == {"loss", "lm_head.weight"}
    assert_close(patched, plain, TOLERANCE)


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=ATTENTION),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
    ],
    ids=["ia3", "loha", "layer-norms"],
)
def test_adapters_of_other_kinds(config: peft.PeftConfig) -> None:
    results = []
    for plan in (None, tiny_plan()):
        torch.manual_seed(1)
        model = get_peft_model(base_model("llama"), copy.deepcopy(config))
        randomise(model)
        if plan is not None:
            apply_plan(model, plan)
        results.append(loss_and_gradients(model, **make_batch()))
    assert_close(results[1], results[0], TOLERANCE)


# Dropout


class Masks(nn.Module):
    """Dropout that keeps the masks it draws, in `drawn`, or applies those that are given."""

    def __init__(self, given: list[Tensor] | None = None) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        if self.given is not None:
            return x * self.given.pop(0).view_as(x)
        self.drawn.append(torch.nn.functional.dropout(torch.ones_like(x), 0.5))
        return x * self.drawn[-1]


DROPOUT = {"target_modules": [*MLP, *HEAD], "lora_dropout": 0.5}


def dropouts(model: PeftModel) -> dict[str, Any]:
    """The dropout holders of all adapted layers."""
    return {name: layer.lora_dropout for name, layer in model.named_modules() if hasattr(layer, "lora_dropout")}


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_every_chunk_draws_masks_of_its_own_and_recompute_the_same(recompute: bool) -> None:
    model = adapted("llama", DROPOUT)
    apply_plan(model, tiny_plan(recompute=recompute))
    for holder in dropouts(model).values():
        holder["default"] = Masks()
    torch.manual_seed(5)
    patched = loss_and_gradients(model, **make_batch())

    plain = adapted("llama", DROPOUT)
    drawn = {name: holder["default"].drawn for name, holder in dropouts(model).items()}
    for name, holder in dropouts(plain).items():
        chunks = 3 if "lm_head" in name else 4  # of tiny_plan
        # The head runs once. An MLP runs in the forward, in its own backward, and with recompute once before that.
        times = 1 if "lm_head" in name else 3 if recompute else 2
        assert len(drawn[name]) == times * chunks
        forward, *again = (drawn[name][start : start + chunks] for start in range(0, times * chunks, chunks))
        assert all(torch.equal(a, b) for masks in again for a, b in zip(masks, forward, strict=True))
        assert not any(torch.equal(forward[0], mask) for mask in forward[1:])
        holder["default"] = Masks(given=[torch.cat(forward, dim=-2)])
    assert_close(patched, loss_and_gradients(plain, **make_batch()), TOLERANCE)


def test_dropout_depends_on_the_seed_alone() -> None:
    results = []
    for recompute, seed in ((False, 5), (True, 5), (True, 6)):
        model = apply_plan(adapted("llama", DROPOUT), tiny_plan(recompute=recompute))
        torch.manual_seed(seed)
        results.append((loss_and_gradients(model, **make_batch()), torch.rand(1)))
    (first, next_number), (same, same_number), (other, _) = results
    assert_close(same, first, TOLERANCE)
    assert torch.equal(next_number, same_number), "recompute leaves the random generator elsewhere"
    assert min(relative_errors(other, first).values()) > 1e-3


# What users do to a model that has a plan

SEVERAL = {"target_modules": [*ATTENTION, *MLP, *HEAD], "modules_to_save": EMBEDDINGS}


@torch.no_grad()
def evaluate(model: nn.Module) -> dict[str, Tensor]:
    """The loss, and the logits without labels."""
    batch = make_batch()
    return {"loss": model(**batch).loss, "logits": model(input_ids=batch["input_ids"]).logits}


def disable(model: PeftModel) -> list[dict[str, Tensor]]:
    with model.disable_adapter():
        without = evaluate(model)
    return [without, loss_and_gradients(model, **make_batch())]


def merge(model: PeftModel) -> list[dict[str, Tensor]]:
    model.merge_adapter()
    merged = evaluate(model)
    model.unmerge_adapter()
    return [merged, loss_and_gradients(model, **make_batch())]


def change_adapters(model: PeftModel) -> list[dict[str, Tensor]]:
    model.add_adapter("second", lora(r=2, target_modules=[*ATTENTION, *MLP, *HEAD]))
    first = loss_and_gradients(model, **make_batch())
    model.set_adapter("second")
    randomise(model)
    second = loss_and_gradients(model, **make_batch())
    model.delete_adapter("default")
    return [first, second, loss_and_gradients(model, **make_batch())]


def save(model: PeftModel) -> list[dict[str, Tensor]]:
    return [peft.get_peft_model_state_dict(model)]


def generate(model: PeftModel) -> list[dict[str, Tensor]]:
    model.eval()
    ids = make_batch()["input_ids"][:, :5]
    return [{"ids": model.generate(input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False).double()}]


@pytest.mark.parametrize("use", [disable, merge, change_adapters, save, generate])
@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_an_adapter_is_used_as_without_a_plan(
    use: Callable[[PeftModel], list[dict[str, Tensor]]], recompute: bool
) -> None:
    plain = use(adapted("llama", SEVERAL))
    patched = use(apply_plan(adapted("llama", SEVERAL), tiny_plan(recompute=recompute)))
    for actual, expected in zip(patched, plain, strict=True):
        assert_close(actual, expected, TOLERANCE)


def test_a_model_merged_and_unloaded_under_its_plan() -> None:
    plain, model = (adapted("llama", SEVERAL) for _ in range(2))
    apply_plan(model, tiny_plan())
    plain, model = plain.merge_and_unload(), model.merge_and_unload()
    ids = make_batch()["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=TOLERANCE, atol=TOLERANCE)
    # The plan's head is not the model's any more.
    with pytest.raises(ValueError, match=r"LM head was changed after mst_ds.apply_plan.*remove_plan\(model\)"):
        model(**make_batch())
    remove_plan(model)
    apply_plan(model, tiny_plan())
    for merged in (plain, model):
        merged.requires_grad_(True)
    assert_close(loss_and_gradients(model, **make_batch()), loss_and_gradients(plain, **make_batch()), TOLERANCE)


def test_another_adapter_between_forward_and_backward_is_refused() -> None:
    # The backward would compute again with the other adapter.
    model = apply_plan(adapted("llama", SEVERAL), tiny_plan())
    model.add_adapter("second", lora(target_modules=MLP))
    loss = model(**make_batch()).loss
    model.set_adapter("second")
    with pytest.raises(ValueError, match="which parameters are trained was changed between forward and backward"):
        loss.backward()
    model.set_adapter("default")
    model(**make_batch()).loss.backward()


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
    plain, patched = base_model(architecture), apply_plan(base_model(architecture), tiny_plan())
    models = []
    for base in (plain, patched):
        torch.manual_seed(1)
        models.append(add(adapter, base))
        randomise(models[-1])
    plain, model = models
    if changed is not None:
        with pytest.raises(ValueError, match=rf"^{changed} was changed after mst_ds.apply_plan") as error:
            model(**make_batch())
        assert "\n" not in str(error.value)
        remove_plan(model)
        apply_plan(model, tiny_plan())
    assert_close(loss_and_gradients(model, **make_batch()), loss_and_gradients(plain, **make_batch()), TOLERANCE)


@pytest.mark.parametrize("head", [None, nn.Linear(32, 97, bias=False, dtype=torch.float64)], ids=["resized", "new"])
def test_a_head_replaced_under_the_plan_is_refused(head: nn.Module | None) -> None:
    model = apply_plan(base_model("llama"), tiny_plan())
    if head is None:
        model.resize_token_embeddings(105, mean_resizing=False)
    else:
        model.set_output_embeddings(head)
    with pytest.raises(ValueError, match="the LM head was changed"):
        model(**make_batch())


# What more than layers is adapted


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
    batch = make_batch()
    if with_mask:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    results = []
    for plan in (None, tiny_plan()):
        torch.manual_seed(1)
        model = get_peft_model(base_model("llama"), copy.deepcopy(config))
        if plan is not None:
            apply_plan(model, plan)
        results.append(loss_and_gradients(model, **batch))
    assert_close(results[1], results[0], TOLERANCE)


@pytest.mark.parametrize("name", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_a_learned_prompt_is_refused_on_shards(name: str) -> None:
    model = get_peft_model(base_model("llama"), getattr(peft, name)(task_type="CAUSAL_LM", num_virtual_tokens=5))
    with pytest.raises(ValueError, match=r"learns a prompt puts it before the sequence.*: use sp_size 1$"):
        apply_plan(model, tiny_plan(Topology(0, 2, 2)), sequence_group=object())


@pytest.mark.parametrize("recompute", [False, True], ids=["keep", "recompute"])
def test_a_learned_prefix_is_refused(recompute: bool) -> None:
    # With recompute transformers drops the prefix without a word.
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = apply_plan(get_peft_model(base_model("llama"), config), tiny_plan(recompute=recompute))
    with pytest.raises(ValueError, match="past_key_values, such as a learned prefix, cannot be trained with a plan"):
        model(**make_batch())


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
        apply_plan(model, tiny_plan(mlp_chunks=1))


# Under DeepSpeed. fp32 sums in another order; measured: up to 1e-6.
ENGINE_TOLERANCE = 1e-5
SEQ_LEN = 131


def fp32_moe() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 99, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_hidden_layers": 2}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts)).train()


ENGINE_CASES: dict[str, tuple[Callable[[], PreTrainedModel], Adapter]] = {
    "everything": (tiny_llama, {"target_modules": [*ATTENTION, *MLP, *HEAD]}),
    # Nothing in front of the first MLP has a gradient.
    "only MLPs, with DoRA": (tiny_llama, {"target_modules": MLP, "use_dora": True}),
    "only the head": (tiny_llama, {"target_modules": HEAD}),
    "modules to save": (tiny_llama, {"target_modules": ["up_proj"], "modules_to_save": [*HEAD, *EMBEDDINGS]}),
    "only experts": (fp32_moe, {"target_modules": [], "target_parameters": EXPERTS}),
}


def fp32_adapted(case: str) -> PeftModel:
    build_model, adapter = ENGINE_CASES[case]
    torch.manual_seed(1)
    model = get_peft_model(build_model(), lora(**adapter))
    randomise(model)
    return model


def train_under_zero(rank: int, stage: int) -> dict[str, Outcome]:
    topology, outcomes = Topology(rank, 2, 2), {}
    for case in ENGINE_CASES:
        model = fp32_adapted(case)
        plan = tiny_plan(topology, SEQ_LEN, zero_stage=stage, mlp_chunks=2 + 3 * rank, loss_chunks=1 + 2 * rank)
        apply_plan(model, plan)
        engine = build_engine(model, zero_optimization=zero_block(stage))
        outcomes[case] = train(engine, shard(samples(2, SEQ_LEN), topology), steps=2)
        engine.destroy()
    return outcomes


@functools.cache
def plain_outcome(case: str) -> Outcome:
    return plain_steps(fp32_adapted(case), samples(2, SEQ_LEN), steps=2)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_train_under_zero_as_in_one_process(stage: int) -> None:
    outcomes, _ = run_ranks(train_under_zero, 2, stage)
    for case, outcome in outcomes.items():
        expected = plain_outcome(case)
        error, name = outcome.worst_gradient_error(expected)
        assert error <= ENGINE_TOLERANCE, f"{case}: gradient of {name} is off by {error:.1e}"
        assert outcome.worst_loss_error(expected) <= ENGINE_TOLERANCE, case

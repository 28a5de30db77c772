"""What of a model is trained: its own weights, some of them, or adapters; and what a plan makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, PeftConfig
from planned import HIDDEN, INTERMEDIATE, LAYERS, MODEL, VOCAB, bytes_of, plan_of
from tiers import slow_but_for
from torch import nn
from transformers import LlamaConfig, MixtralConfig

from mst_ds.adapters import model_on_meta
from mst_ds.answers.variants import lora_shape
from mst_ds.memory.dry_run import dry_run, planned_activations
from mst_ds.model_shape import ModelShape, TrainedCounts, load_config_of_shape
from mst_ds.planner import make_plan
from mst_ds.structure.trained import trained_shape

RANK = 4
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]


def lora(targets: list[str], **settings: Any) -> PeftConfig:
    return LoraConfig(r=RANK, target_modules=targets, task_type="CAUSAL_LM", **settings)


def shape_with(peft_config: PeftConfig | None, config: LlamaConfig = MODEL) -> ModelShape:
    return trained_shape(ModelShape.from_config(config), model_on_meta(config, peft_config)[0])


def test_without_adapters_all_is_trained() -> None:
    assert shape_with(None) == ModelShape.from_config(MODEL)


def test_adapters_are_counted_by_the_config_alone_as_on_the_model() -> None:
    """For the advice of mst-plan, which must not load torch; of experts the config does not say enough."""
    assert lora_shape(ModelShape.from_config(MODEL), RANK) == shape_with(lora([*ATTENTION, *MLP], lora_dropout=0.05))
    assert lora_shape(shape_with(lora(ATTENTION)), RANK) is None
    assert lora_shape(ModelShape.from_config(MixtralConfig()), RANK) is None


def test_attention_is_asked_of_the_model() -> None:
    """A config that names no kind of its layers says nothing of what they compute."""
    model = model_on_meta(MODEL, None)[0]
    model.model.layers[0].convolution = nn.Conv1d(1, 1, 1)
    assert not ModelShape.from_config(MODEL).has_own_attention
    shape = trained_shape(ModelShape.from_config(MODEL), model)
    assert shape.has_own_attention
    plan = plan_of(model=shape, mst={"recompute": True, "layer_chunks": 4})
    assert plan.settings.layer_chunks == 1


def test_adapters_are_counted_and_nothing_else() -> None:
    shape, whole = shape_with(lora([*ATTENTION, *MLP, "lm_head"])), ModelShape.from_config(MODEL)
    of_attention = RANK * (4 * HIDDEN + 2 * HIDDEN + 2 * (HIDDEN // 4))
    of_mlp, of_head = RANK * 3 * (HIDDEN + INTERMEDIATE), RANK * (HIDDEN + VOCAB)
    added = LAYERS * (of_attention + of_mlp) + of_head
    assert shape.trained == TrainedCounts(
        all=added, layer=of_attention + of_mlp, mlp=of_mlp, head=of_head, embedding=0, largest=RANK * VOCAB
    )
    assert shape.parameter_count == whole.parameter_count + added
    assert shape.layer_parameter_count == whole.layer_parameter_count + of_attention + of_mlp


def test_a_frozen_body_with_a_trained_head() -> None:
    model = model_on_meta(MODEL, None)[0]
    model.model.requires_grad_(False)
    shape = trained_shape(ModelShape.from_config(MODEL), model)
    head = VOCAB * HIDDEN
    assert shape.trained == TrainedCounts(all=head, layer=0, mlp=0, head=head, embedding=0, largest=head)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_what_is_trained_has_gradients_and_optimizer_states(stage: int) -> None:
    shape = shape_with(lora(ATTENTION))
    plan = plan_of(stage, model=shape, dtype="fp32", mst={"recompute": True})
    states, ranks = bytes_of(plan, "optimizer_step"), 4
    of_rank = -(-shape.trained.all // ranks) if stage else shape.trained.all
    assert states["optimizer_moments"] == 2 * 4 * of_rank
    assert states["parameters"] == 4 * (shape.parameter_count if stage < 3 else -(-shape.parameter_count // ranks))
    assert states["gradients"] <= 4 * shape.trained.all
    backward = bytes_of(plan, "backward")
    assert not {"mlp_weight_gradients", "head_gradient"} & backward.keys()
    assert "head_gradient" not in bytes_of(plan, "loss")


def test_frozen_weights_have_no_gradient_to_compute() -> None:
    settings: dict[str, Any] = {"world_size": 8, "seq_len": 4096, "device_memory": 2**40}
    whole, adapted = (make_plan(shape_with(each), {}, **settings) for each in (None, lora(ATTENTION)))
    shape, added = ModelShape.from_config(MODEL), shape_with(lora(ATTENTION)).trained.all
    of_norms = (2 * LAYERS + 1) * HIDDEN
    matrices = shape.parameter_count - shape.embedding_parameter_count - of_norms
    assert whole.flops - adapted.flops == 2 * 4096 // 8 * (matrices - added)


def test_dropout_of_adapters_is_kept_with_its_mask() -> None:
    plan = plan_of(model=shape_with(lora(ATTENTION, lora_dropout=0.1)), mst={"recompute": True})
    assert bytes_of(plan, "backward")["adapter_dropout"] == 4000 * 4 * HIDDEN * (2 + 1)


DRY_RUNS: list[tuple[list[str], dict[str, Any], float]] = [
    (ATTENTION, {"recompute": False, "keep_mlp": False}, 0.02),
    (ATTENTION, {"recompute": False, "keep_mlp": True}, 0.02),
    (ATTENTION, {"keep_attention": True, "keep_mlp": True}, 0.02),
    # An MLP with adapters is differentiated by autograd, chunk by chunk, for which no term is exact.
    *(([*ATTENTION, *MLP], {"keep_attention": True, "mlp_chunks": chunks}, 0.05) for chunks in ("auto", 2)),
]


@pytest.mark.parametrize("case", slow_but_for(DRY_RUNS[2:4], DRY_RUNS))
def test_the_plan_is_that_of_a_dry_run(case: tuple[list[str], dict[str, Any], float]) -> None:
    targets, mst, tolerance = case
    config, adapters = load_config_of_shape("meta-llama/Llama-3.1-8B"), lora(targets)
    config.num_hidden_layers = 4
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "mst": {"attention": "sdpa"} | mst}
    plan = make_plan(
        shape_with(adapters, config), ds_config, world_size=8, seq_len=131_072, sp_size=8, device_memory=2**60
    )
    planned, measured = planned_activations(plan), dry_run(config, plan, adapters)
    for phase, count in measured.items():
        assert planned[phase] == pytest.approx(count, rel=tolerance), phase

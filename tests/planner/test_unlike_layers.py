"""Plans of models whose layers differ: against a dry run, and against the products that a step computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from count_products import CountMultiplications
from tiers import slow_but_for
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    Dots3NoteTextConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from mst_ds import apply_settings
from mst_ds.adapters import model_on_meta
from mst_ds.memory.dry_run import as_on_an_accelerator, dry_run, planned_activations
from mst_ds.model_shape import ModelShape, flops_per_token
from mst_ds.planner import make_plan
from mst_ds.planner.cost import all_to_all_seconds
from mst_ds.planner.flops import attention_forward_flops, matrix_flops
from mst_ds.planner.rates import Rates
from mst_ds.planner.workload import Workload
from mst_ds.settings import Settings
from mst_ds.zero import read_zero

SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "sliding_window": 2048,
    "vocab_size": 16_000,
}
# The last three layers read keys of earlier ones.
SHARING = {"num_kv_shared_layers": 3, "hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 16_000}
GEMMA_4 = Gemma4TextConfig(**SIZES | SHARING, global_head_dim=256, use_double_wide_mlp=True)
GEMMA_4_WITHOUT = Gemma4TextConfig(**SIZES, global_head_dim=256, hidden_size_per_layer_input=0)
GEMMA_3N = Gemma3nTextConfig(
    **SIZES | SHARING | {"intermediate_size": 8192}, activation_sparsity_pattern=[0.95] * 3 + [0.0] * 3
)
OFF = {"recompute": False, "keep_mlp": False}
KEPT, OFFLOADED = (
    {"keep_attention": True, "offload_activations": offload, "keep_mlp": False} for offload in (False, True)
)
CONFIGS = {"gemma4": GEMMA_4, "gemma4-without": GEMMA_4_WITHOUT, "gemma3n": GEMMA_3N}
CASES = [
    *((name, mst) for name in CONFIGS for mst in (KEPT, OFF)),
    *((name, mst) for name in ("gemma4", "gemma3n") for mst in (OFFLOADED, {"layer_chunks": 4} | KEPT)),
]
FLOPS = [("gemma4", {"recompute": True, "keep_mlp": True}), ("gemma3n", {"recompute": True})]
QUICK = [CASES[0], CASES[4]]


@pytest.mark.parametrize("case", slow_but_for(QUICK, CASES), ids=str)
def test_formulas_give_the_peak_of_the_dry_run(case: tuple[str, dict[str, Any]]) -> None:
    name, mst = case
    config = CONFIGS[name]
    ds_config = {
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 1,
        "mst": {"attention": "sdpa", "mlp_chunks": 4, "loss_chunks": 64} | mst,
    }
    plan = make_plan(config, ds_config, world_size=8, seq_len=16_384, sp_size=1, device_memory=2**60)
    planned, measured = planned_activations(plan), dry_run(config, plan)
    assert max(planned.values()) == pytest.approx(max(measured.values()), rel=0.05), (planned, measured)


def workload(config: PreTrainedConfig, **settings: Any) -> Workload:
    zero = read_zero({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}, dp_world_size=8)
    return Workload(ModelShape.from_config(config), zero, seq_len=2048, settings=Settings(**settings))


def products_of_a_step(config: PreTrainedConfig, settings: Settings) -> int:
    """FLOPs of the products of matrices, which attention in one kernel has none of."""
    model: Any = model_on_meta(config, None, torch.bfloat16)[1].train()
    apply_settings(model, settings)
    with FakeTensorMode(), as_on_an_accelerator():
        model._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
        ids = torch.empty((1, 2048), dtype=torch.long)
        with CountMultiplications() as counted:
            model(input_ids=ids, position_ids=ids, shift_labels=ids, num_items_in_batch=2048).loss.backward()
    return 2 * counted.multiplications


@pytest.mark.parametrize("case", slow_but_for([FLOPS[0]], FLOPS), ids=str)
def test_flops_are_those_of_the_products_of_a_step(case: tuple[str, dict[str, Any]]) -> None:
    name, settings = case
    config = CONFIGS[name]
    asked = Settings(mlp_chunks=2, loss_chunks=2, attention="sdpa", **settings)
    work = workload(config, **vars(asked))
    assert matrix_flops(work) == pytest.approx(products_of_a_step(config, asked), rel=0.005)


def test_attention_is_added_up_over_layers_of_their_own_heads() -> None:
    work = workload(GEMMA_4_WITHOUT)
    # Windows are as long as the sequence: pairs of a causal one. Four layers with heads of 128, two with 256.
    pairs, width = 2048 * 2048 - 2048 * 2048 // 2, 8 * 2 * (4 * 128 + 2 * 256)
    assert attention_forward_flops(work) == 2 * pairs * width
    assert flops_per_token(work.shape, 2048) == 6 * work.shape.active_parameter_count + 6 * pairs / 2048 * width


def test_what_ranks_exchange_is_added_up_over_layers() -> None:
    work = workload(GEMMA_4_WITHOUT, sp_size=2, recompute=False)
    rates = Rates(1.0, 1.0, 1.0, 1.0, launch_seconds=0.0, node=1.0, network=1.0)
    # Forward queries, keys, values and output; backward those, and gradients of all.
    elements = sum(layers * (8 + 2 + 2 + 8) * head_dim * 3 for layers, head_dim in ((4, 128), (2, 256)))
    assert all_to_all_seconds(work, rates) == pytest.approx(1024 * elements * 2 / 2, rel=1e-6)


def test_the_most_ranks_are_those_of_the_layer_with_fewest_heads() -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = Dots3NoteTextConfig(**heads, **{f"swa_{name}": 4 for name in heads}, use_dsa=False)
    assert ModelShape.from_config(config).max_sp_size == 4


@pytest.mark.parametrize("config", [LlamaConfig(), Gemma2Config()], ids=["llama", "gemma2"])
def test_a_model_of_alike_layers_is_one_kind(config: PreTrainedConfig) -> None:
    work = workload(config)
    assert work.kinds == (work,)
    assert work.shape.kinds == (work.shape,)
    assert work.shape.first_layers(3).layers == work.shape.layers[:3]


def test_kinds_have_all_layers_and_their_windows() -> None:
    shape = ModelShape.from_config(GEMMA_4)
    kinds = [
        (kind.num_hidden_layers, kind.head_dim, kind.layers[0].has_own_keys, kind.window_layers) for kind in shape.kinds
    ]
    assert kinds == [(2, 128, True, (0, 1)), (1, 256, True, ()), (2, 128, False, (0, 1)), (1, 256, False, ())]

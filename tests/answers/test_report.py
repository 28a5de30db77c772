"""The plan as people read it."""

import io
import re

import pytest
from planned import ATTENTION, choices_of, llama_8b_plan, small_plan
from rich.console import Console
from transformers import AutoConfig, LlamaConfig, Mamba2Config, MambaConfig, Qwen3NextConfig, StableLmConfig

from mst_ds.answers import plan_table
from mst_ds.answers.verdict import seconds_text
from mst_ds.config import GIB
from mst_ds.planner import gpu_by_name, make_plan


def test_the_report_shows_every_phase_with_its_largest_terms_and_the_verdict():
    plan = small_plan()
    text = rendered(plan)
    for phase in plan.phases:
        (line,) = [line for line in text.splitlines() if phase.name in line and "│" in line]
        on_device = sorted((term.bytes, term.name) for term in phase.terms if term.place == "device")
        assert f"{phase.device_bytes / GIB:.3f}" in line
        assert on_device[-1][1] in line
        assert on_device[0][1] not in line
    assert f"mlp_chunks {plan.settings.mlp_chunks}, loss_chunks {plan.settings.loss_chunks}" in text
    assert f"at the peak ({plan.peak_phase.name}) fits in 8.000 GiB" in text
    assert "does NOT fit in" in rendered(small_plan(device_memory=1))


def test_the_report_shows_what_is_kept_and_what_that_costs():
    text = rendered(llama_8b_plan(keep_attention=True, offload_activations=True, head_groups=2))
    assert "mlp_chunks 64, loss_chunks 64, recompute, keep_attention, offload_activations, head_groups 2" in text
    assert f"{ATTENTION / 10**12:.3f} TFLOPs" in text.replace("-", "")
    costs = text[text.index("TFLOPs a micro-batch") :]
    assert costs.index("recompute true") < costs.index("keep_attention true") < costs.index("offload_activations true")
    assert "GiB copied" in costs
    on_device = {"keep_attention": False, "offload_activations": False, "head_groups": 1}
    kept_on_device = rendered(llama_8b_plan(**on_device, keep_mlp=False))
    assert "recompute, head_groups" in kept_on_device
    assert "recompute, keep_mlp, head_groups" in rendered(llama_8b_plan(**on_device, keep_mlp=True))
    assert "loss_chunks 64, head_groups" in rendered(llama_8b_plan(recompute=False, keep_mlp=False, head_groups=1))
    nothing_twice = llama_8b_plan(recompute=False, keep_mlp=True, head_groups=1)
    text = " ".join(rendered(nothing_twice).split())  # wherever lines end
    assert "loss_chunks 64, keep_mlp, head_groups" in text
    assert f"keep_mlp true: +{choices_of(nothing_twice)['keep_mlp'].device_bytes / GIB:.3f} GiB on the device" in text


def test_the_report_says_what_chunks_of_a_layer_save_and_cost():
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "mst": {"layer_chunks": 4}}
    arguments = {"world_size": 8, "seq_len": 2**20, "device_memory": 80 * GIB, "gpu": gpu_by_name("H100")}
    plan = make_plan("meta-llama/Llama-3.1-8B", ds_config, **arguments)
    choice = choices_of(plan)["layer_chunks"]
    assert choice.device_bytes < 0 < choice.seconds
    (line,) = re.findall(r"layer_chunks 4: ([^;]*)", " ".join(rendered(plan).split()))
    assert line.startswith(f"{choice.device_bytes / GIB:.3f} GiB on the device")
    assert line.endswith(f"{choice.seconds:+.3g} s a step")


@pytest.mark.parametrize(
    ("seconds", "text", "signed"),
    [
        (0.012345, "0.0123", "+0.0123"),
        (999.4, "999", "+999"),
        (999.6, "1,000", "+1,000"),
        (-3712.4, "-3,712", "-3,712"),
    ],
)
def test_seconds_are_three_digits_and_no_exponent(seconds, text, signed):
    assert (seconds_text(seconds), seconds_text(seconds, sign="+")) == (text, signed)


def test_the_report_says_where_parameters_are_not_counted_exactly():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4}
    plans = [
        make_plan(config(**sizes), {}, world_size=1, seq_len=64, device_memory=GIB)
        for config in (LlamaConfig, StableLmConfig)
    ]
    assert [plan.counts_are_exact for plan in plans] == [True, False]
    # Wherever its line ends.
    assert ["an estimate" in " ".join(rendered(plan).split()) for plan in plans] == [False, True]


def test_layers_that_are_not_attention_are_planned_on_one_rank_and_said_to_be_an_estimate():
    kinds = ["full_attention", "indexed_attention"]
    hybrid = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, layer_types=kinds
    )
    arguments = {"model_config": hybrid, "ds_config": {}, "world_size": 2, "seq_len": 64, "device_memory": GIB}
    text = " ".join(rendered(make_plan(**arguments, sp_size=1)).split())
    assert "layers of type indexed_attention planned as if they were attention, an estimate" in text
    with pytest.raises(
        ValueError, match="layers of type indexed_attention, which sequence parallelism does not support"
    ):
        make_plan(**arguments, sp_size=2)


def test_ranks_share_the_heads_that_a_config_names_for_other_layers():
    hybrid = Qwen3NextConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=8,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        layer_types=["linear_attention", "full_attention"],
    )
    arguments = {"model_config": hybrid, "ds_config": {}, "seq_len": 4096, "device_memory": GIB}
    plan = make_plan(**arguments, world_size=8, sp_size=4)
    assert (plan.sp_size, plan.settings.layer_chunks) == (4, 1)
    with pytest.raises(ValueError, match=r"sp_size is 8, but .* with 4 heads to divide; allowed: at most 4"):
        make_plan(**arguments, world_size=8, sp_size=8)


def test_an_indexers_keys_go_to_every_rank():
    config = AutoConfig.for_model("deepseek_v32", num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=8)
    arguments = {"model_config": config, "ds_config": {"bf16": {"enabled": True}}, "seq_len": 8192}
    plan = make_plan(**arguments, world_size=8, sp_size=8, device_memory=200 * GIB)
    assert (plan.sp_size, plan.settings.layer_chunks) == (8, 1)
    assert "indexed_attention planned as if they were attention" in " ".join(rendered(plan).split())


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (Mamba2Config(num_heads=4, head_dim=32, hidden_size=64, num_hidden_layers=2), 4),
        (MambaConfig(hidden_size=64, num_hidden_layers=2), 128),
    ],
)
def test_ranks_share_the_heads_or_channels_of_a_model_without_attention(config, heads):
    arguments = {"model_config": config, "ds_config": {}, "seq_len": 4096, "device_memory": GIB}
    plan = make_plan(**arguments, world_size=heads, sp_size=heads)
    assert (plan.sp_size, plan.settings.mlp_chunks) == (heads, 1)
    with pytest.raises(ValueError, match=f"has {heads} query heads"):
        make_plan(**arguments, world_size=2 * heads, sp_size=2 * heads)


def rendered(plan):
    console = Console(file=io.StringIO(), width=250)
    console.print(plan_table(plan))
    return console.file.getvalue()

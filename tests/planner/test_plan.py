"""From config files to a plan, and the plan as people read it."""

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import LlamaConfig, StableLmConfig

from mst_ds.config import GIB, TrainConfig
from mst_ds.planner import make_plan, plan_table
from mst_ds.zero import load_ds_config, resolve

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)


def small_plan(ds_config=DS_CONFIGS / "zero3_mst.json", **overrides):
    arguments = {"world_size": 2, "seq_len": 4096, "device_memory": 8 * GIB} | overrides
    return make_plan("small_llama", ds_config, **arguments)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_give_a_plan_that_fits(path):
    plan = small_plan(path)
    assert plan.fits
    assert (plan.sp_size, plan.dp_size, plan.seq_len, plan.shard_length) == (2, 1, 4096, 2048)
    assert (plan.zero_stage, plan.recompute) == (int(path.stem[4]), True)
    assert (plan.host_bytes > 0) == ("offload" in path.stem)


def test_a_path_and_its_content_and_a_name_and_its_config_give_the_same_plan():
    from mst_ds.model_shape import load_model_config

    path = DS_CONFIGS / "zero3_mst.json"
    content = json.loads(path.read_text())
    from_content = make_plan(
        load_model_config("small_llama"), content, world_size=2, seq_len=4096, device_memory=8 * GIB
    )
    assert from_content == small_plan(str(path))
    assert content == json.loads(path.read_text())


def test_ranks_differ_only_in_where_they_stand():
    plans = [small_plan(world_size=4, sp_size=2, rank=rank) for rank in range(4)]
    assert [(plan.dp_rank, plan.sp_rank) for plan in plans] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({dataclasses.replace(plan, topology=plans[0].topology) for plan in plans}) == 1


def test_sp_size_comes_from_the_argument_then_the_block_then_the_node():
    ds_config = {"mst": {"sp_size": 4}}
    assert small_plan(ds_config, world_size=8, sp_size=2).sp_size == 2
    assert small_plan(ds_config, world_size=8).sp_size == 4
    assert small_plan({}, world_size=8, ranks_per_node=2).sp_size == 2
    assert small_plan({}, world_size=8).sp_size == 4  # the model has 4 query heads


def test_device_memory_comes_from_the_argument_then_the_block():
    ds_config = {"mst": {"device_memory_gib": 1.5}}
    assert small_plan(ds_config, device_memory=None).device_memory == 3 * GIB // 2
    assert small_plan(ds_config).device_memory == 8 * GIB
    with pytest.raises(ValueError, match="device_memory is not known; allowed: bytes, or a number in 'mst'"):
        small_plan({}, device_memory=None)


def test_auto_dtype_plans_for_an_accelerator_and_a_resolved_config_for_its_machine():
    raw = load_ds_config(DS_CONFIGS / "zero3_mst.json")
    assert small_plan(raw).dtype == "bf16"
    on_cpu = resolve(raw, train=TrainConfig(), hidden_size=128, has_accelerator=False, dp_size=1)
    assert small_plan(on_cpu).dtype == "fp32"


def test_recompute_is_on_unless_switched_off():
    assert [small_plan({"mst": {"recompute": value}}).recompute for value in ("auto", True, False)] == [
        True,
        True,
        False,
    ]


def test_attention_is_what_can_run(monkeypatch):
    bf16 = {"bf16": {"enabled": True}}
    for is_installed, expected in [(False, "sdpa"), (True, "flash_attention_2")]:
        monkeypatch.setattr("transformers.utils.import_utils.is_flash_attn_2_available", lambda i=is_installed: i)
        assert small_plan(bf16).attention == expected
        assert small_plan({}).attention == "sdpa"  # fp32
    assert small_plan(bf16 | {"mst": {"attention": "sdpa"}}).attention == "sdpa"
    with pytest.raises(ValueError, match="'flash_attention_2', which has no fp32; allowed: 'sdpa', or enable bf16"):
        small_plan({"mst": {"attention": "flash_attention_2"}})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"seq_len": 0}, "seq_len is 0"),
        ({"world_size": 0}, "world_size is 0"),
        ({"rank": 2}, "rank is 2; allowed: 0 to 1"),
        ({"sp_size": 3}, "sp_size is 3, which does not divide the world size 2"),
        ({"world_size": 8, "sp_size": 8}, "sp_size is 8, but the model has 4 query heads"),
        ({"device_memory": 0}, "device_memory is 0"),
        (
            {"ds_config": {"mst": {"mlp_chunks": 4096}}},
            "mlp_chunks is 4096, more than the 2048 tokens of a rank",
        ),
        ({"ds_config": {"train_batch_size": 2}}, "train_batch_size is 2; allowed: 1"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        small_plan(**overrides)
    assert "\n" not in str(error.value)


def test_a_plan_that_does_not_fit_is_a_plan():
    plan = small_plan(device_memory=1)
    assert not plan.fits
    exact = small_plan(device_memory=plan.peak_bytes)
    assert exact.fits
    assert not small_plan(device_memory=exact.peak_bytes - 1).fits


def test_longer_sequences_never_need_less():
    peaks = [
        make_plan(
            LLAMA_8B,
            DS_CONFIGS / "zero3_mst.json",
            world_size=8,
            seq_len=seq_len,
            device_memory=80 * GIB,
        ).peak_bytes
        for seq_len in (8192, 65536, 131072, 131073, 1_000_000, 2**20)
    ]
    assert peaks == sorted(peaks)


def test_the_report_shows_every_phase_with_its_largest_terms_and_the_verdict():
    plan = small_plan()
    text = rendered(plan)
    for phase in plan.phases:
        (line,) = [line for line in text.splitlines() if phase.name in line and "│" in line]
        on_device = sorted((term.bytes, term.name) for term in phase.terms if term.place == "device")
        assert f"{phase.device_bytes / GIB:.3f}" in line
        assert on_device[-1][1] in line
        assert on_device[0][1] not in line
    assert f"mlp_chunks {plan.mlp_chunks}, loss_chunks {plan.loss_chunks}" in text
    assert f"at the peak ({plan.peak_phase.name}) fits in 8.000 GiB" in text
    assert "does NOT fit in" in rendered(small_plan(device_memory=1))


def test_the_report_says_where_parameters_are_not_counted_exactly():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    plans = [
        make_plan(config(**sizes), {}, world_size=1, seq_len=64, device_memory=GIB)
        for config in (LlamaConfig, StableLmConfig)
    ]
    assert [plan.counts_are_exact for plan in plans] == [True, False]
    assert ["an estimate" in rendered(plan) for plan in plans] == [False, True]


def rendered(plan):
    console = Console(file=io.StringIO(), width=250)
    console.print(plan_table(plan))
    return console.file.getvalue()

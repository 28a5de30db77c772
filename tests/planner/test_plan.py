"""From config files to a plan."""

import dataclasses
import itertools
import json

import pytest
from planned import (
    ATTENTION,
    DS_CONFIGS,
    EXPERTS,
    HIDDEN,
    LLAMA_8B,
    choices_of,
    experts_with,
    llama_8b_plan,
    small_plan,
)
from transformers import Gemma2Config, Olmo2Config

from mst_ds.config import GIB, TrainConfig
from mst_ds.planner import make_plan
from mst_ds.settings import MstConfig, Settings
from mst_ds.zero import load_ds_config, resolve


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_configs_give_a_plan_that_fits(path):
    plan = small_plan(path)
    assert plan.fits
    assert (plan.sp_size, plan.dp_size, plan.seq_len, plan.shard_length) == (2, 1, 4096, 2048)
    assert (plan.zero_stage, plan.settings.recompute) == (int(path.stem[4]), False)
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


def test_recompute_is_off_where_the_step_fits_without_it_unless_the_user_says_so():
    def plan(recompute, device_memory):
        mst = {"recompute": recompute, "mlp_chunks": 64, "loss_chunks": 64}
        return llama_8b_plan(device_memory=device_memory, **mst)

    peak = plan(False, 1).peak_bytes
    assert [plan("auto", memory).settings.recompute for memory in (2 * peak, peak, peak - 1, 1)] == [
        False,
        False,
        True,
        True,
    ]
    assert plan("auto", peak - 1).settings.keep_attention
    for value in (True, False):
        assert {plan(value, memory).settings.recompute for memory in (2 * peak, peak, peak - 1, 1)} == {value}


# By hand, of one rank's micro-batch: layers x 2 x tokens x weights for the four projections; ATTENTION likewise.
INPUT_PROJECTIONS = 32 * 2 * 2**16 * (4096 * 4096 + 2 * 4096 * 1024)
PROJECTIONS = INPUT_PROJECTIONS + 32 * 2 * 2**16 * 4096 * 4096
MLP = 32 * 2 * 2**16 * 3 * 4096 * 14336
HEAD = 2 * 2**16 * 4096 * 128256


def test_the_flops_of_a_micro_batch_by_hand():
    # An attention's backward is 5 products to the forward's 2.
    minimum = 3 * PROJECTIONS + 7 * ATTENTION // 2 + 3 * MLP + 3 * HEAD
    gate_and_up = 2 * MLP // 3
    assert llama_8b_plan(recompute=False, keep_mlp=True).flops == minimum
    assert llama_8b_plan(recompute=False, keep_mlp=False).flops == minimum + gate_and_up
    settings = {"recompute": True, "keep_mlp": False}
    kept, again = (llama_8b_plan(**settings, keep_attention=keeps).flops for keeps in (True, False))
    assert kept == minimum + gate_and_up + PROJECTIONS
    assert again == kept + ATTENTION
    # Chunks of a layer read earlier ones' keys: kept, or computed before the backward, with the queries beside them.
    settings["layer_chunks"] = 4
    in_chunks, again = (llama_8b_plan(**settings, keep_attention=keeps).flops for keeps in (True, False))
    assert in_chunks == kept
    assert again == kept + ATTENTION + INPUT_PROJECTIONS
    assert llama_8b_plan(recompute=True, keep_attention=True, keep_mlp=True).flops == minimum + PROJECTIONS


def test_experts_compute_their_own_again_whatever_is_kept():
    """Of a layer with experts the MLP beside them keeps gate and up, and so does the MLP of a dense layer."""

    def flops_saved(model):
        mst = {"recompute": False}
        arguments = {"world_size": 1, "seq_len": 64, "device_memory": GIB}
        kept, again = (make_plan(model, {"mst": mst | {"keep_mlp": keeps}}, **arguments) for keeps in (True, False))
        assert kept.settings.keep_mlp == (model is EXPERTS)
        return again.flops - kept.flops

    shared, dense = 2 * EXPERTS.shared_expert_intermediate_size, EXPERTS.intermediate_size
    assert flops_saved(EXPERTS) == 2 * 64 * 2 * HIDDEN * (shared + dense)
    assert flops_saved(experts_with(mlp_only_layers=[], shared_expert_intermediate_size=0)) == 0


def test_a_norm_of_the_mlps_output_needs_its_forward_again():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    for keep_mlp, matrices in ((False, 3), (True, 1)):
        flops = {
            recompute: make_plan(
                Olmo2Config(**sizes),
                {"mst": {"recompute": recompute, "keep_mlp": keep_mlp}},
                world_size=1,
                seq_len=64,
                device_memory=GIB,
            ).flops
            for recompute in (True, False)
        }
        assert flops[True] - flops[False] == 2 * 2 * 64 * (4 * 64 * 64 + matrices * 64 * 96)


def test_each_choice_has_its_memory_and_its_time():
    on_device = choices_of(llama_8b_plan(keep_attention=True, offload_activations=False))
    output, log_sum_exp = 32 * 2**16 * 4096 * 2, 32 * 2**17 * 16 * 4
    kept = on_device["keep_attention"]
    assert (kept.value, kept.flops, kept.host_bytes, kept.copied_bytes) == (True, -ATTENTION, 0, 0)
    with_it, without = (
        {
            phase.name: phase.device_bytes
            for phase in llama_8b_plan(keep_attention=keeps, offload_activations=False).phases
        }
        for keeps in (True, False)
    )
    assert with_it["loss"] - without["loss"] == output + log_sum_exp  # all of it is kept then
    assert kept.device_bytes == max(with_it.values()) - max(without.values())
    assert on_device["recompute"].flops == PROJECTIONS
    assert on_device["recompute"].device_bytes < 0
    # Against recompute that keeps attention, on the device.
    off = choices_of(llama_8b_plan(recompute=False, keep_mlp=False))["recompute"]
    assert (off.value, off.flops, off.device_bytes) == (False, -PROJECTIONS, -on_device["recompute"].device_bytes)
    layer_inputs = output
    on_host = llama_8b_plan(keep_attention=True, offload_activations=True)
    offload = choices_of(on_host)["offload_activations"]
    assert offload.copied_bytes == 2 * (layer_inputs + output + log_sum_exp)
    assert offload.device_bytes == -(layer_inputs + output + log_sum_exp) * 30 // 32
    assert offload.host_bytes == on_host.host_bytes == layer_inputs + output + log_sum_exp
    assert offload.flops == 0


def test_kept_gate_and_up_have_their_memory_and_their_time():
    kept, again = (llama_8b_plan(recompute=False, keep_mlp=keeps) for keeps in (True, False))
    on, off = choices_of(kept)["keep_mlp"], choices_of(again)["keep_mlp"]
    assert (on.value, on.flops, on.host_bytes, on.copied_bytes) == (True, -2 * MLP // 3, 0, 0)
    assert (off.value, off.flops, off.device_bytes) == (False, 2 * MLP // 3, -on.device_bytes)
    of_layer = 2 * 2**16 * 14336 * 2
    assert on.device_bytes == kept.peak_bytes - again.peak_bytes
    assert on.device_bytes == pytest.approx(32 * of_layer, rel=0.01)
    by_phase = [{phase.name: phase.device_bytes for phase in plan.phases} for plan in (kept, again)]
    assert by_phase[0]["loss"] - by_phase[1]["loss"] == 32 * of_layer
    # Against recompute with attention kept, and gate and up as well.
    assert choices_of(kept)["recompute"].flops == -PROJECTIONS


def test_gate_and_up_on_the_host_have_their_memory_and_their_time():
    host = {"keep_attention": True, "offload_activations": True}
    kept, again = (llama_8b_plan(**host, keep_mlp=keeps) for keeps in (True, False))
    on = choices_of(kept)["keep_mlp"]
    of_tensor = 2**16 * 14336 * 2
    assert (on.value, on.flops, on.copied_bytes) == (True, -2 * MLP // 3, 2 * 32 * 2 * of_tensor)
    assert on.host_bytes == kept.host_bytes - again.host_bytes == 32 * 2 * of_tensor  # in 56 pieces each
    # Of two layers, one of which is on its way; the chunks of the MLP need less in turn.
    by_phase = [{phase.name: phase.device_bytes for phase in plan.phases} for plan in (kept, again)]
    assert by_phase[0]["loss"] - by_phase[1]["loss"] == 2 * 2 * of_tensor


@pytest.mark.parametrize("layer_chunks", [1, 4])
def test_opposite_settings_cost_what_the_other_saves(layer_chunks):
    plans = [llama_8b_plan(keep_attention=value, layer_chunks=layer_chunks) for value in (True, False)]
    one, other = (choices_of(plan)["keep_attention"] for plan in plans)
    assert (one.value, other.value) == (True, False)
    assert (one.device_bytes, one.flops) == (-other.device_bytes, -other.flops)


def test_without_recompute_there_is_no_choice_of_what_it_keeps():
    assert set(choices_of(llama_8b_plan(recompute=False))) == {"recompute", "keep_mlp", "head_groups"}
    with_recompute = {"recompute", "keep_attention", "offload_activations", "keep_mlp", "head_groups"}
    assert set(choices_of(llama_8b_plan())) == with_recompute
    assert "head_groups" not in choices_of(small_plan(world_size=1))


def test_groups_of_heads_save_memory_and_no_flops():
    choice = choices_of(llama_8b_plan(head_groups=4, keep_attention=False))["head_groups"]
    assert choice.value == 4
    assert choice.device_bytes < 0
    assert (choice.flops, choice.host_bytes, choice.copied_bytes) == (0, 0, 0)


def test_host_memory_lets_the_planner_use_the_host():
    def plan(host_memory, **overrides):
        return make_plan(
            LLAMA_8B,
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}},
            **{"world_size": 8, "seq_len": 2_000_000, "device_memory": 80 * GIB, "host_memory": host_memory}
            | overrides,
        )

    assert (plan(None).settings.offload_activations, plan(None).settings.keep_attention) == (False, False)
    with_host = plan(1000 * GIB)
    assert (with_host.settings.offload_activations, with_host.settings.keep_attention, with_host.fits) == (
        True,
        True,
        True,
    )
    assert 0 < with_host.host_bytes <= 1000 * GIB
    assert not plan(with_host.host_bytes - 1).settings.keep_attention


def test_attention_is_what_can_run(monkeypatch):
    bf16 = {"bf16": {"enabled": True}}
    capped = Gemma2Config(vocab_size=128, hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
    for version, expected in [(None, "sdpa"), ("2.8.3", "flash_attention_2")]:
        monkeypatch.setattr("mst_ds.planner.request.flash_attn_2_version", lambda v=version: v)
        assert small_plan(bf16, model=capped).settings.attention == expected
        assert small_plan({}, model=capped).settings.attention == "sdpa"  # fp32
        assert small_plan(bf16).settings.attention == "sdpa"  # torch has all that it needs
    assert small_plan(bf16 | {"mst": {"attention": "sdpa"}}).settings.attention == "sdpa"
    for name in ("flash_attention_2", "flash_attention_3"):
        assert small_plan(bf16 | {"mst": {"attention": name}}).settings.attention == name
        with pytest.raises(ValueError, match=f"'{name}', which has no fp32; allowed: 'sdpa', or enable bf16"):
            small_plan({"mst": {"attention": name}})


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
            {"ds_config": {"mst": {"recompute": False, "keep_attention": True}}},
            "keep_attention in 'mst' is True, but recompute is False",
        ),
        ({"ds_config": {"mst": {"head_groups": 0}}}, "head_groups in 'mst' is 0"),
        ({"host_memory": -1}, "host_memory is -1; allowed: a whole number of bytes >= 0"),
        (
            {"ds_config": {"mst": {"mlp_chunks": 4096}}},
            "mlp_chunks is 4096, more than the 2048 tokens of a rank",
        ),
        (
            {"ds_config": {"mst": {"layer_chunks": 4096}, "train_micro_batch_size_per_gpu": 4}},
            "layer_chunks is 4096, more than the 2048 tokens of a shard; allowed: 'auto' or 1 to 2048",
        ),
        ({"ds_config": {"train_batch_size": 3}}, "train_batch_size is 3; allowed: 1"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        small_plan(**overrides)
    assert "\n" not in str(error.value)


def test_chunks_of_a_layer_are_as_the_user_set_them_and_mean_recompute():
    assert (small_plan().settings.layer_chunks, small_plan().settings.recompute) == (1, False)
    plan = small_plan(ds_config={"mst": {"layer_chunks": 4}})
    assert (plan.settings.layer_chunks, plan.settings.recompute) == (4, True)
    assert plan.as_dict()["layer_chunks"] == 4
    assert choices_of(plan)["layer_chunks"].value == 4


def test_a_plan_that_does_not_fit_is_a_plan():
    plan = small_plan(device_memory=1)
    assert not plan.fits
    exact = small_plan(device_memory=plan.peak_bytes)
    assert exact.fits
    assert not small_plan(device_memory=exact.peak_bytes - 1).fits


LENGTHS = (8192, 65536, 131072, 131073, 1_000_000, 2**20)


def plan_of_length(seq_len, device_memory, **mst):
    ds_config = load_ds_config(DS_CONFIGS / "zero3_mst.json") | {"mst": mst}
    return make_plan(LLAMA_8B, ds_config, world_size=8, seq_len=seq_len, device_memory=device_memory)


@pytest.mark.parametrize(
    "mst",
    [{"recompute": False}, *({"keep_attention": True, "layer_chunks": chunks} for chunks in (1, 4))],
    ids=["no recompute", "one chunk of a layer", "4 chunks of a layer"],
)
def test_longer_sequences_never_need_less(mst):
    """With what is kept settled: where it is chosen, a longer one keeps less, or has more chunks of a layer."""
    peaks = [plan_of_length(seq_len, 80 * GIB, keep_mlp=False, **mst).peak_bytes for seq_len in LENGTHS]
    assert peaks == sorted(peaks)


def test_what_fits_at_a_length_fits_at_every_shorter_one():
    for shorter, longer in itertools.pairwise(LENGTHS):
        lowest = plan_of_length(longer, 1, recompute=True).peak_bytes
        assert plan_of_length(shorter, lowest, recompute=True).fits


def test_the_reserve_is_a_term_of_every_phase():
    plain, reserved = small_plan(), small_plan(reserve=GIB)
    assert reserved.settings.mlp_chunks == plain.settings.mlp_chunks
    assert [phase.device_bytes for phase in reserved.phases] == [phase.device_bytes + GIB for phase in plain.phases]
    ds_config = load_ds_config(DS_CONFIGS / "zero3_mst.json")
    ds_config["mst"]["reserve_gib"] = 0.5
    assert small_plan(ds_config, reserve=GIB).peak_bytes == plain.peak_bytes + GIB // 2
    ds_config["mst"]["reserve_gib"] = 0
    assert small_plan(ds_config, reserve=GIB).phases == plain.phases
    assert small_plan(device_memory=GIB).fits
    assert not small_plan(device_memory=GIB, reserve=GIB).fits
    with pytest.raises(ValueError, match="reserve is -1; allowed: a whole number of bytes >= 0"):
        small_plan(reserve=-1)


def test_a_knob_that_no_search_chooses_is_as_the_user_settled_it(monkeypatch):
    """A trial one, which formulas know nothing of."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class WithTrial(Settings):
        trial: int = 1

    monkeypatch.setattr("mst_ds.planner.request.Settings", WithTrial)
    monkeypatch.setattr(MstConfig, "from_dict", classmethod(lambda cls, block: MstConfig(block)))
    assert small_plan({"mst": {"trial": 8}}).settings.trial == 8
    assert small_plan({}).settings.trial == 1

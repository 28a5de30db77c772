"""The changes that are offered where a plan does not fit: each does fit, and nothing smaller of its kind does."""

import dataclasses

import pytest

from mst_ds.answers import changes_that_fit, changes_that_help, variants
from mst_ds.config import GIB
from mst_ds.gpus import gpu_by_name
from mst_ds.planner import plan_of_request, read_request

LLAMA_8B, LLAMA_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"


def request(model=LLAMA_8B, *, stage=3, zero=None, mst=None, **arguments):
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage} | (zero or {}), "mst": mst or {}}
    arguments = {"world_size": 8, "seq_len": 2**20, "device_memory": 77 * GIB, "ranks_per_node": 8} | arguments
    return read_request(model, ds_config, **arguments)


def offered(asked):
    return [dict(change.settings) for change in changes_that_fit(asked)]


def fits(**changed):
    return plan_of_request(request(**changed)).fits


def test_each_kind_of_change_is_the_smallest_that_fits():
    case = {"sp_size": 2, "seq_len": 600 * 1024}
    assert not fits(**case)
    by_kind = {next(iter(change)): change for change in offered(request(**case))}
    sp_size = by_kind["sp_size"]["sp_size"]
    assert fits(**case | {"sp_size": sp_size})
    assert not fits(**case | {"sp_size": sp_size // 2})
    assert by_kind["offload_activations"] == {"offload_activations": True}
    assert fits(**case, mst={"offload_activations": True})
    nodes = by_kind["num_nodes"]
    assert fits(**case | {"world_size": 8 * nodes["num_nodes"], "sp_size": nodes.get("sp_size", 2)})
    longest = by_kind["seq_len"]["seq_len"]
    assert fits(**case | {"seq_len": longest})
    assert not fits(**case | {"seq_len": longest + 1024})


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_states_that_do_not_fit_are_sharded_or_put_on_the_host(stage):
    case = {"stage": stage, "seq_len": 4096}
    changes = offered(request(**case, device_memory=40 * GIB))
    assert {"stage": max(2, stage + 1)} in changes
    assert all("seq_len" not in change for change in changes), "no sequence is short enough"
    for change in changes:
        zero = {key: {"device": value} for key, value in change.items() if key.startswith("offload_")}
        wanted = case | {"stage": change.get("stage", stage)}
        memory = gpu_by_name(change["gpu"]).memory if "gpu" in change else 40 * GIB
        world_size = 8 * change.get("num_nodes", 1)
        # Adapters are counted on a model: test_trained has them.
        assert "lora_r" in change or fits(**wanted, zero=zero, device_memory=memory, world_size=world_size)


def test_parameters_go_to_the_host_where_the_optimizer_alone_is_not_enough():
    case = {"model": LLAMA_70B, "seq_len": 4096, "device_memory": 24 * GIB}
    assert not fits(**case, zero={"offload_optimizer": {"device": "cpu"}})
    assert {"offload_optimizer": "cpu", "offload_param": "cpu"} in offered(request(**case))


@pytest.mark.parametrize("mst", [{"recompute": False}, {"offload_activations": True}], ids=str)
def test_what_the_user_set_is_not_offered(mst):
    changes = offered(request(sp_size=2, mst=mst))
    assert changes
    assert all("offload_activations" not in change for change in changes)


def test_where_nothing_of_the_run_helps_the_smallest_gpu_is_offered():
    assert offered(request(device_memory=1, seq_len=1024)) == [{"gpu": "A10G"}]


def test_more_ranks_to_a_sequence_are_not_offered_where_layers_are_not_attention():
    asked = request(sp_size=1, seq_len=300 * 1024)
    hybrid = dataclasses.replace(asked.work.shape, other_layers=("linear_attention",))
    offers = [
        {name for change in changes_that_fit(each) for name, _ in change.settings}
        for each in (asked, dataclasses.replace(asked, work=dataclasses.replace(asked.work, shape=hybrid)))
    ]
    assert [("sp_size" in names, "offload_activations" in names) for names in offers] == [(True, True), (False, True)]


def test_changes_read_as_settings():
    (first, *_) = changes_that_fit(request(sp_size=2, seq_len=600 * 1024))
    assert str(first).startswith("sp_size ")


def test_a_host_that_is_too_small_is_offered_as_large_as_it_must_be():
    """Also one of which nothing is known; a GiB less is not enough."""
    case = {"seq_len": 8_000 * 1024, "device_memory": 79 * GIB}
    for known in (None, 100 * GIB):
        by_kind = {next(iter(change)): change for change in offered(request(**case, host_memory=known))}
        needed = by_kind["host_memory_gib"]["host_memory_gib"] * GIB // 8
        assert fits(**case, host_memory=needed)
        assert not fits(**case, host_memory=needed - GIB // 8)


def test_a_smaller_micro_batch_is_offered_with_as_many_sequences_a_step():
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 4}
    arguments = {"world_size": 8, "seq_len": 600 * 1024, "device_memory": 77 * GIB, "ranks_per_node": 8}
    changes = changes_that_fit(read_request(LLAMA_8B, ds_config, **arguments))
    (change,) = (change for change in changes if change.settings[0][0] == "per_device_train_batch_size")
    sequences, accumulation = change.plan.micro_batch_size, change.plan.gradient_accumulation_steps
    assert change.settings[1] == ("gradient_accumulation_steps", accumulation)
    assert sequences * accumulation == 4
    assert plan_of_request(
        read_request(LLAMA_8B, ds_config | {"train_micro_batch_size_per_gpu": 4}, **arguments)
    ).fits < (change.plan.fits)


def test_what_is_offered_keeps_the_samples_of_a_step_that_the_json_fixes():
    """A run refuses all else: four groups of ranks with three sequences each, or with three after another."""
    fixed = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, "train_batch_size": 12}
    fixed |= {"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 1}
    arguments = {"world_size": 8, "ranks_per_node": 8, "device_memory": 77 * GIB, "gpu": gpu_by_name("H100")}
    changes = changes_that_fit(read_request(LLAMA_8B, fixed, seq_len=200 * 1024, **arguments))
    assert {change.plan.samples_per_step for change in changes} == {12}
    offers = [dict(change.settings) for change in changes]
    assert {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3} in offers
    assert {"num_nodes": 2, "sp_size": 4} in [dict(list(offer.items())[:2]) for offer in offers]
    assert not any("sp_size" in offer for offer in offers if "num_nodes" not in offer)
    # Half the nodes would have half the groups.
    of_two = read_request(LLAMA_8B, fixed, seq_len=8192, **arguments | {"world_size": 16})
    assert list(variants.fewer_nodes(of_two)) == []
    assert [nodes for nodes, _ in variants.fewer_nodes(dataclasses.replace(of_two, samples_per_step=None))] == [1]


def test_a_plan_that_fits_is_made_faster_or_cheaper():
    """Each change has more tokens a second of each GPU, and fits; without rates there is none."""
    known = {"gpu": gpu_by_name("H100"), "seq_len": 2**19, "host_memory": 200 * GIB}
    slow = request(world_size=16, sp_size=16, zero={"offload_optimizer": {"device": "cpu"}}, **known)
    plan = plan_of_request(slow)
    assert plan.fits
    changes = changes_that_help(slow, plan)
    assert {name for change in changes for name, _ in change.settings} >= {"sp_size"}
    for change in changes:
        assert change.plan.fits
        gpus = change.plan.topology.world_size
        assert change.plan.tokens_per_second / gpus > 1.02 * plan.tokens_per_second / 16
    unknown = request(world_size=16, sp_size=16, seq_len=2**19)
    assert changes_that_help(unknown, plan_of_request(unknown)) == ()

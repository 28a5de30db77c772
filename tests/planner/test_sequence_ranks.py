"""`sp_size` "auto" is chosen like everything else: what is predicted fastest among what fits."""

from dataclasses import asdict

import pytest

from mst_ds.planner import gpu_by_name, longest_of_request, plan_of_request, read_request
from mst_ds.planner.sequence_ranks import settle_sp_size

GIB = 2**30
LLAMA_8B = "meta-llama/Llama-3.1-8B"


def request(seq_len, *, nodes=1, gpu="H100", ds_config=None, **arguments):
    config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}, **(ds_config or {})}
    return read_request(
        LLAMA_8B,
        config,
        world_size=8 * nodes,
        ranks_per_node=8,
        seq_len=seq_len,
        device_memory=79 * GIB,
        reserve=2 * GIB,
        host_memory=1900 * GIB // 8,
        gpu=None if gpu is None else gpu_by_name(gpu),
        **arguments,
    )


@pytest.mark.parametrize(("seq_len", "expected"), [(8192, 1), (32768, 4), (2**20, 8)])
def test_the_fastest_that_fits_is_chosen(seq_len, expected):
    asked = request(seq_len)
    plan = plan_of_request(asked)
    rates = {}
    for size in (1, 2, 4, 8):
        settled = plan_of_request(request(seq_len, sp_size=size))
        if settled.fits:
            rates[size] = settled.dp_size / settled.predicted_step_seconds
    assert plan.sp_size == expected == max(size for size, rate in rates.items() if rate >= 0.98 * max(rates.values()))
    # It is the plan of that size, in everything.
    assert asdict(plan) == asdict(plan_of_request(request(seq_len, sp_size=expected)))


def test_a_sequence_may_need_several_nodes():
    lengths = {nodes: longest_of_request(request(1024, nodes=nodes)) for nodes in (1, 2, 4)}
    assert lengths[2] > 1.9 * lengths[1]
    assert lengths[4] > 1.9 * lengths[2]
    # Of one node the host is the limit, of which pieces in fewer chunks need more.
    assert [plan_of_request(request(lengths[1] + more)).fits for more in (0, 1024)] == [True, False]
    for gpu in ("H100", None):
        of_two = plan_of_request(request(3 * lengths[1] // 2, nodes=2, gpu=gpu))
        assert (of_two.sp_size, of_two.fits) == (16, True)
        assert not plan_of_request(request(lengths[4] + 1024, nodes=4, gpu=gpu)).fits


def test_devices_of_unknown_rates_take_the_ranks_of_a_node():
    assert [plan_of_request(request(length, nodes=2, gpu=None)).sp_size for length in (1024, 2**20)] == [8, 8]


def test_the_samples_of_a_step_settle_it():
    """A step of two samples on eight ranks gives four to each; what the user settled is not chosen either."""
    asked = request(8192, ds_config={"train_batch_size": 2})
    assert [option.work.sp_size for option in asked.options()] == [4]
    assert plan_of_request(asked).samples_per_step == 2
    with pytest.raises(ValueError, match="train_batch_size is 3; allowed: 1 = "):
        request(8192, ds_config={"train_batch_size": 3})
    settled = settle_sp_size(request(8192))
    assert settled.options() == (settled,)
    for fixed in (request(8192, sp_size=2), request(8192, ds_config={"mst": {"sp_size": 2}})):
        assert [option.work.sp_size for option in fixed.options()] == [2]

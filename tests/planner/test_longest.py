"""The longest sequence that fits: it does, and the next longer one does not."""

from itertools import pairwise

import pytest

from mst_ds.config import GIB
from mst_ds.planner import gpu_by_name, longest_seq_len, make_plan
from mst_ds.planner.plan import LENGTH_STEP

LLAMA_8B = "meta-llama/Llama-3.1-8B"
MST_BLOCKS = {
    "all is chosen": {},
    "no recompute": {"recompute": False},
    "attention again": {"keep_attention": False, "offload_activations": False},
    "offload": {"offload_activations": True},
    "given chunks": {"mlp_chunks": 1, "loss_chunks": 40},
    "one group of heads": {"head_groups": 1},
    "sp 2": {"sp_size": 2},
}


def config_with(mst, stage=3):
    return {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}, "mst": mst}


@pytest.mark.parametrize("host_memory", [None, 100 * GIB])
@pytest.mark.parametrize("mst", MST_BLOCKS.values(), ids=MST_BLOCKS)
@pytest.mark.parametrize("model", [LLAMA_8B, "google/gemma-2-9b"])
def test_the_longest_is_the_last_that_fits(model, mst, host_memory):
    arguments = {"world_size": 8, "device_memory": 80 * GIB, "host_memory": host_memory}
    longest = longest_seq_len(model, config_with(mst), **arguments)
    assert longest > 0
    assert longest % LENGTH_STEP == 0
    fits = [
        make_plan(model, config_with(mst), seq_len=seq_len, **arguments).fits
        for seq_len in (longest // 3, longest, longest + LENGTH_STEP)
    ]
    assert fits == [True, True, False]


@pytest.mark.parametrize(("host_memory", "rounded"), [(None, 0), (50 * GIB, 0.02)])
def test_more_memory_never_gives_a_shorter_longest(host_memory, rounded):
    """But for what the host's pieces round: some counts of chunks fill them better than others."""
    lengths = [
        longest_seq_len(LLAMA_8B, config_with({}), world_size=8, device_memory=memory * GIB, host_memory=host_memory)
        for memory in range(8, 150, 6)
    ]
    assert all(more >= less * (1 - rounded) for less, more in pairwise(lengths))
    assert lengths[0] == 0 < lengths[-1]


def test_where_nothing_fits_it_is_zero():
    assert longest_seq_len(LLAMA_8B, config_with({}, stage=0), world_size=1, device_memory=80 * GIB) == 0


def test_gpus_by_name():
    assert gpu_by_name("H100").memory == gpu_by_name("a100-80gb").memory == 79 * GIB
    with pytest.raises(ValueError, match=r"gpu is 'H10'; nearest: 'H100'; allowed: A10G, .*, or device_memory_gib"):
        gpu_by_name("H10")

"""What the host and the device have on the way to NVMe, by hand from what DeepSpeed's swappers allocate.

`tests/planner/test_host_memory.py` measures it where async_io can be built."""

import pytest
from planned import SIZES, bytes_of, plan_of, terms_of
from transformers import LlamaConfig

# Shards of two ranks: embedding and head 2,048,000 elements; per layer four of attention, 131,072, three of the MLP,
# 393,216; five norms of 256. Sub-groups of 2,000,000 elements or more end at the embedding, after the values of
# the second layer, and at the head; the norms are a group of their own.
MODEL = LlamaConfig(
    **SIZES | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 2, "vocab_size": 8000},
    num_key_value_heads=8,
)
EMBEDDING, ATTENTION, MLP, NORMS = 2_048_000, 131_072, 393_216, 5 * 256
LAYER = 4 * ATTENTION + 3 * MLP
DECAYED = 2 * EMBEDDING + 2 * LAYER
LARGEST = ATTENTION + 3 * MLP + EMBEDDING
NVME = {"device": "nvme", "buffer_count": 6}
OPTIMIZER = {"offload_optimizer": NVME, "sub_group_size": 2_000_000}


def plan(**zero):
    aio = zero.pop("aio", {})
    return plan_of(3, model=MODEL, world_size=2, zero=OPTIMIZER | zero, aio=aio)


def test_states_on_nvme_come_through_buffers_of_a_sub_group():
    """No gradient of the whole shard in fp32: a sub-group's comes from its file into the last buffer."""
    for phase in ("initialisation", "backward", "optimizer_step"):
        terms = terms_of(plan(), phase)
        for name, count in {"master_parameters": DECAYED, "optimizer_moments": 2 * DECAYED}.items():
            assert (terms[name].place, terms[name].bytes) == ("nvme", 4 * count)
        assert (terms["optimizer_swap_buffers"].place, terms["optimizer_swap_buffers"].bytes) == (
            "host",
            6 * LARGEST * 4,
        )
        # The norms are less than the least file, 1 MiB.
        on_host = {"master_parameters_on_host": 4, "optimizer_moments_on_host": 8, "fp32_gradient": 4}
        for name, count in on_host.items():
            assert (terms[name].place, terms[name].bytes) == ("host", count * NORMS)
        assert terms["fp32_gradient_rounding"].bytes == 8192 - 4 * NORMS
    # Made by the first step, before they have files.
    assert bytes_of(plan(), "optimizer_step")["first_moments"] == 2 * LARGEST * 4
    assert "first_moments" not in bytes_of(plan(), "backward")


def test_buffers_are_whole_blocks_of_the_drive():
    """1 KiB for each thread: 7168 bytes, of which the largest sub-group is 1874 and a part."""
    terms = bytes_of(plan(aio={"intra_op_parallelism": 7}), "backward")
    assert terms["optimizer_swap_buffers"] == 6 * 1875 * 7168


def test_fp32_gradients_wait_on_the_device_for_files():
    """What is reduced together, here one weight; and those of attention, half a MiB each, which have no file. Those of
    the MLP end within a block of 7168 bytes: DeepSpeed keeps a view of each one's rest, and so all of it."""
    backward = bytes_of(plan(), "backward")
    assert backward["fp32_gradients_leaving"] == 4 * EMBEDDING
    assert backward["fp32_gradients_on_device"] == 4 * 8 * ATTENTION
    assert bytes_of(plan(), "optimizer_step")["fp32_gradients_on_device"] == 4 * 8 * ATTENTION
    cut = bytes_of(plan(aio={"intra_op_parallelism": 7}), "backward")
    assert cut["fp32_gradients_on_device"] == 4 * DECAYED
    # A file is never shorter than a block that is written at once.
    few = bytes_of(plan(aio={"block_size": 2**21}), "backward")
    assert few["fp32_gradients_on_device"] == 4 * 2 * LAYER


def test_parameters_on_nvme_leave_some_on_the_host():
    """3,000,000 parameters may stay: the embedding does, and the next sub-group is longer than what is left."""
    param = NVME | {"buffer_size": 2_050_000, "max_in_cpu": 3_000_000}
    terms = bytes_of(plan(offload_param=param), "loss")
    assert terms["parameters_on_host"] == 2 * 3_000_000
    assert terms["parameters_on_host_rounding"] == 2**23 - 2 * 3_000_000
    # Less than 1 MiB each: all but embedding and head.
    assert terms["small_parameters_on_host"] == 2 * (2 * LAYER + NORMS)
    assert terms["small_parameters_on_host_rounding"] == 6 * (2**20 - 2 * MLP)
    assert terms["parameter_return_buffer"] == 2 * LARGEST
    assert terms["parameter_swap_buffers"] == 2 * 6 * 4004 * 512  # blocks of 1 KiB
    # DeepSpeed's own number is a billion: nothing leaves.
    terms = bytes_of(plan(offload_param={"device": "nvme"}), "loss")
    assert terms["parameters_on_host"] == 2 * (DECAYED + NORMS)
    assert not {"small_parameters_on_host", "parameter_return_buffer"} & terms.keys()
    assert terms["parameter_swap_buffers"] == 2 * 5 * 195_313 * 512


TOO_FEW = {"device": "nvme", "buffer_count": 3}


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        (
            {"offload_param": NVME | {"buffer_size": EMBEDDING - 1}},
            rf"buffer_size .*: {EMBEDDING} or more",
        ),
        (
            {"offload_optimizer": {"device": "nvme", "buffer_count": 3}},
            "offload_optimizer.buffer_count is 3.*: 4 or more",
        ),
        ({"offload_optimizer": NVME | {"pipeline_read": True}}, "buffer_count is 6, .* allowed: 8 or more"),
    ],
)
def test_buffers_that_deepspeed_would_end_at_are_refused(zero, message):
    with pytest.raises(ValueError, match=message):
        plan(**zero)

"""Ranks with devices of different size: their own chunk counts, and alike in all that they wait for each other in."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from plain_model import assert_close
from steps import alone, build_engine, train, zero_block
from tiny import tiny_llama

from mst_ds import GIB, Plan, apply_plan, make_plan
from mst_ds.config import TrainConfig
from mst_ds.data import shard
from mst_ds.engine import Launch, meet, prepare
from mst_ds.gpus import gpu_by_name
from mst_ds.model_shape import load_config_of_shape
from mst_ds.planner import Request, longest_seq_len

SEQ_LEN, STEPS = 2048, 2
DIMENSIONS = {"intermediate_size": 512, "max_position_embeddings": SEQ_LEN}
# Sums over chunks in fp32, in another order.
TOLERANCE = 1e-5


def llama_plans(memory: list[int], seq_len: int | None = None) -> list[Plan]:
    """Of both ranks; as long as the smaller device can hold it, if no length is given."""
    model = load_config_of_shape("meta-llama/Llama-3.2-1B")
    model.intermediate_size *= 4  # so that chunks of the MLP need more than attention does
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}
    arguments: dict[str, Any] = {"world_size": 2, "sp_size": 2, "device_memory": memory}
    seq_len = seq_len or longest_seq_len(model, ds_config, **arguments)
    return [make_plan(model, ds_config, rank=rank, seq_len=seq_len, **arguments) for rank in range(2)]


def test_the_smaller_device_has_more_chunks_and_decides_what_is_done_alike() -> None:
    large, small = llama_plans([80 * GIB, 40 * GIB])
    assert (large.device_memory, small.device_memory) == (80 * GIB, 40 * GIB)
    assert large.fits
    assert small.fits
    one, other = large.settings, small.settings
    assert (one.mlp_chunks, one.loss_chunks) < (other.mlp_chunks, other.loss_chunks)
    alike = ("recompute", "keep_attention", "offload_activations", "keep_mlp", "head_groups")
    of_equal = llama_plans([40 * GIB, 40 * GIB])[1].settings
    assert [getattr(one, name) for name in alike] == [getattr(other, name) for name in alike]
    assert [getattr(other, name) for name in alike] == [getattr(of_equal, name) for name in alike]


@pytest.mark.parametrize("memory", [[GIB], [GIB] * 3])
def test_every_rank_has_a_number(memory: list[int]) -> None:
    with pytest.raises(ValueError, match=f"device_memory has {len(memory)} numbers for 2 ranks; allowed: one for each"):
        llama_plans(memory, 4096)


def unequal_plan(rank: int) -> Plan:
    ds_config = {"zero_optimization": zero_block(3, reduce_bucket_size=1), "mst": {}}
    model = tiny_llama(**DIMENSIONS).config
    arguments: dict[str, Any] = {"world_size": 2, "sp_size": 2, "seq_len": SEQ_LEN, "rank": rank}
    return make_plan(model, ds_config, device_memory=[GIB, 1], **arguments)


def train_on_unequal_ranks(rank: int) -> tuple[int, Any]:
    plan = unequal_plan(rank)
    model = apply_plan(tiny_llama(**DIMENSIONS), plan)
    engine = build_engine(model, zero_optimization=zero_block(3))
    given = {"input_ids": tokens(), "labels": tokens()}
    batch = shard(given, plan.topology, layer_chunks=plan.settings.layer_chunks)
    outcome = train(engine, [batch], STEPS)
    engine.destroy()
    return plan.settings.loss_chunks, outcome


def tokens() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(2, 60, (1, SEQ_LEN), generator=generator)


def test_ranks_with_their_own_chunk_counts_train_exactly() -> None:
    (of_large, first), (of_small, second) = run_ranks(train_on_unequal_ranks, 2)
    assert of_large < of_small
    assert first.losses == second.losses
    expected = alone(tiny_llama(**DIMENSIONS), [tokens()])
    assert first.losses[0] == pytest.approx(float(expected.pop("loss")), rel=TOLERANCE)
    assert_close(first.gradients, expected, TOLERANCE)
    assert first.losses[1] < first.losses[0]


def requests_before_and_after_meeting(rank: int) -> list[Request]:
    """Of a rank with an H100 and a large host, and one with an A100, which is as large, and a small host."""
    gpu, host_memory = [(gpu_by_name("H100"), 200 * GIB), (gpu_by_name("A100-80GB"), 100 * GIB)][rank]
    found = {"rank_gpu": gpu, "rank_capability": gpu.capability, "rank_host_memory": host_memory}
    found["rank_device_memory"] = gpu.memory
    with (
        patch.multiple("mst_ds.engine.preparation", **{name: lambda launch, x=x: x for name, x in found.items()}),
        patch.dict("os.environ", TORCHELASTIC_USE_AGENT_STORE="True"),  # the ranks have met
    ):
        run = prepare(TrainConfig(seq_len=2048), Launch(rank, 2, rank, 2))
        return [run.request, meet(run).request]


def test_ranks_choose_for_the_slowest_device_and_the_smallest_host() -> None:
    (before, after), (other_before, other_after) = run_ranks(requests_before_and_after_meeting, 2)
    assert before != other_before
    assert after.work == other_after.work == other_before.work
    assert after.rates == other_after.rates == gpu_by_name("A100-80GB")
    assert after.host_memory == other_after.host_memory == 100 * GIB

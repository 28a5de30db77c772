"""The planner against DeepSpeed: what a rank's process grows by, host and device together, which here are one."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import psutil
import pytest
import torch
from distributed import run_ranks
from steps import build_engine
from tiers import slow_but_for
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from mst_ds import apply_plan, make_plan
from mst_ds.data import shard
from mst_ds.memory.phases import planned_bytes
from mst_ds.training.loop import train_step

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 500,
}
LARGE: dict[str, Any] = SMALL | {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "vocab_size": 16_000,
}
OFFLOAD_OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = {**OFFLOAD_OPTIMIZER, "offload_param": {"device": "cpu"}}
KEPT_ON_HOST = {"recompute": True, "keep_attention": True, "offload_activations": True, "mlp_chunks": 8}
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {  # stage, length, zero_optimization, "mst"
    "stage 1": (1, 512, OFFLOAD_OPTIMIZER, {}),
    "stage 2": (2, 512, OFFLOAD_OPTIMIZER, {}),
    "stage 3": (3, 512, OFFLOAD_OPTIMIZER, {}),
    "stage 3, parameters too": (3, 512, OFFLOAD_ALL, {}),
    "stage 3, activations too": (3, 8192, OFFLOAD_ALL, KEPT_ON_HOST | {"loss_chunks": 32}),
}
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)
# Of resident memory: libraries and allocators have pages of their own, and a page counts once it is touched.
TOLERANCE = 0.15


def resident_bytes() -> int:
    """Of this process, once what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def measure(rank: int, case: str) -> dict[str, tuple[int, int]]:
    """Bytes that were planned, and by which the process has grown: after a step, and at the end of a forward."""
    # Each tensor a mapping of its own: of the heap, a freed tensor below one in use would stay resident.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    stage, seq_len, zero, mst = CASES[case]
    # What is loaded on first use, kernels and collectives, is no memory of the plan's.
    _steps(rank, SMALL, stage, 64, zero, mst)
    return _steps(rank, LARGE, stage, seq_len, zero, mst)


def _steps(
    rank: int, sizes: dict[str, Any], stage: int, seq_len: int, zero: dict[str, Any], mst: dict[str, Any]
) -> dict[str, tuple[int, int]]:
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 300_000,
            "allgather_bucket_size": 300_000,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": False,
            **zero,
        },
    }
    config = LlamaConfig(**sizes, max_position_embeddings=seq_len)
    with_mst = ds_config | {"mst": {"attention": "sdpa"} | mst}
    plan = make_plan(config, with_mst, world_size=2, sp_size=2, seq_len=seq_len, rank=rank, device_memory=2**40)
    before = resident_bytes()
    at_stage_3 = HfDeepSpeedConfig(ds_config) if stage == 3 else None
    model = LlamaForCausalLM._from_config(config) if at_stage_3 else LlamaForCausalLM(config)
    apply_plan(model.train(), plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine = build_engine(model, optimizer=optimizer, **ds_config)
    ids = torch.randint(2, config.vocab_size, (1, seq_len))
    batch = shard({"input_ids": ids, "labels": ids}, plan.topology, layer_chunks=plan.settings.layer_chunks)
    at_forwards_end = []
    hook = engine.module.model.register_forward_hook(lambda *_: at_forwards_end.append(resident_bytes()))
    for _ in range(2):
        train_step(engine, [batch])
    after = resident_bytes()
    hook.remove()
    engine.destroy()
    planned = {phase.name: planned_bytes(phase, torch.device("cpu")) for phase in plan.phases}
    return {
        "between steps": (planned["initialisation"], after - before),
        "end of the forward": (planned["forward"], at_forwards_end[-1] - before),
    }


@pytest.mark.parametrize("case", slow_but_for(["stage 3, parameters too"], CASES))
def test_a_process_grows_by_what_is_planned(case: str) -> None:
    for results in run_ranks(measure, 2, case, fresh=True):
        # Where activations stay on the device, the forward ends below its highest point.
        moments = results if "activations" in case else ["between steps"]
        for moment in moments:
            planned, grown = results[moment]
            print(case, moment, planned / 2**20, grown / 2**20, grown / planned)
            assert grown == pytest.approx(planned, rel=TOLERANCE), (moment, results)

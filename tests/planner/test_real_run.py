"""The planner against DeepSpeed: what is alive in each phase of a real step of two ranks is what was planned."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from distributed import run_ranks
from steps import build_engine
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from mst_ds import apply_plan, make_plan
from mst_ds.data import shard
from mst_ds.geometry import ELEMENTS_THAT_KEEP_BUSY
from mst_ds.memory.live import LiveMemory
from mst_ds.memory.phases import planned_bytes
from mst_ds.minisequence import chunks
from mst_ds.training.loop import train_step

VOCAB, SEQ_LEN = 2000, 4096
MODEL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": VOCAB,
    "max_position_embeddings": SEQ_LEN,
}
BUCKETS = {"reduce_bucket_size": 300_000, "allgather_bucket_size": 300_000, "overlap_comm": False}
AT_STAGE_3 = {"stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
OFFLOAD_OPTIMIZER = {"offload_optimizer": {"device": "cpu"}}
OFFLOAD_ALL = {**OFFLOAD_OPTIMIZER, "offload_param": {"device": "cpu"}}
CHUNKS_4 = {"recompute": True, "keep_attention": True, "keep_mlp": False, "mlp_chunks": 4, "loss_chunks": 4}
CHUNKS_2_8 = {"recompute": False, "keep_mlp": False, "mlp_chunks": 2, "loss_chunks": 8}
Case = tuple[int, int, dict[str, Any], dict[str, Any]]  # sp_size, seq_len, zero_optimization, the "mst" block

COMMON: list[Case] = [
    (1, SEQ_LEN, {}, CHUNKS_4),
    (2, SEQ_LEN, {}, CHUNKS_4),
    (1, SEQ_LEN, {}, CHUNKS_2_8),
    # So short that the peak of the backward is at the first layer, where gradients need most.
    (1, 256, {}, CHUNKS_4),
]
OF_STAGE_3: list[Case] = [
    (1, SEQ_LEN, OFFLOAD_ALL, CHUNKS_4),
    (2, SEQ_LEN, OFFLOAD_ALL, CHUNKS_4),
    # The weights of attention and of norms persist.
    (1, 256, {"stage3_param_persistence_threshold": 256 * 256, "stage3_max_reuse_distance": 0}, CHUNKS_4),
    # Nothing stays from the forward to the backward; one layer and the head do.
    (1, SEQ_LEN, {"stage3_max_reuse_distance": 0}, CHUNKS_4),
    (1, SEQ_LEN, {"stage3_max_reuse_distance": 2 * 256 * VOCAB + 1}, CHUNKS_4),
]
# What layers keep is the same at every stage; gradients and states are not.
OF_STATES: list[Case] = [COMMON[1], COMMON[-1], (1, SEQ_LEN, OFFLOAD_OPTIMIZER, CHUNKS_4)]
CASES = {0: COMMON, 1: OF_STATES, 2: OF_STATES, 3: OF_STATES + OF_STAGE_3}
FEW_CASES = [(1, 256, {}, CHUNKS_4), (2, SEQ_LEN, OFFLOAD_ALL, CHUNKS_4)]


def ds_config_of(stage: int, zero: dict[str, Any], mst: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **BUCKETS, **(AT_STAGE_3 if stage == 3 else {}), **zero},
        "mst": {"attention": "sdpa", **mst},
    }


def measure(rank: int, stage: int, cases: list[Case]) -> list[dict[str, tuple[int, int]]]:
    """Bytes of each phase, planned and alive, in the second step: then DeepSpeed knows the order of modules."""
    return [_measure(rank, stage, case) for case in cases]


def _measure(rank: int, stage: int, case: Case) -> dict[str, tuple[int, int]]:
    sp_size, seq_len, zero, mst = case
    ds_config, config = ds_config_of(stage, zero, mst), LlamaConfig(**MODEL)
    plan = make_plan(config, ds_config, world_size=2, sp_size=sp_size, seq_len=seq_len, rank=rank, device_memory=2**40)
    ds_config.pop("mst")
    memory, alive = LiveMemory(), dict[str, int]()

    def end(phase: str) -> None:
        alive[phase] = memory.peak
        memory.reset_peak()

    def begin_loss(decoder: Any, inputs: Any, outputs: Any) -> None:
        end("forward")
        outputs.last_hidden_state.register_hook(lambda _: end("loss"))

    # As on an accelerator: elementwise work in chunks that do not follow from the CPU's cache.
    with patch.object(chunks, "ELEMENTS_IN_CACHE_OF_CPU", ELEMENTS_THAT_KEEP_BUSY), memory:
        at_stage_3 = HfDeepSpeedConfig(ds_config) if stage == 3 else None
        model = LlamaForCausalLM._from_config(config) if at_stage_3 else LlamaForCausalLM(config)
        apply_plan(model.train(), plan)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        engine = build_engine(model, optimizer=optimizer, **ds_config)
        ids = torch.randint(2, VOCAB, (1, seq_len))
        batch = shard({"input_ids": ids, "labels": ids}, plan.topology, layer_chunks=plan.settings.layer_chunks)
        train_step(engine, [batch])
        memory.reset_peak()
        hook = engine.module.model.register_forward_hook(begin_loss)
        take_step = engine.step
        engine.step = lambda: (end("backward"), take_step(), end("optimizer_step"))
        train_step(engine, [batch])
    hook.remove()
    engine.step = take_step
    engine.destroy()
    return {
        phase.name: (planned_bytes(phase, torch.device("cpu")), alive[phase.name])
        for phase in plan.phases
        if phase.name in alive
    }


@pytest.mark.parametrize(
    ("stage", "cases"),
    [
        pytest.param(3, FEW_CASES, id="few"),
        *(
            pytest.param(stage, rest, id=f"stage {stage}", marks=pytest.mark.slow)
            for stage, cases in CASES.items()
            if (rest := [case for case in cases if stage < 3 or case not in FEW_CASES])
        ),
    ],
)
def test_every_phase_needs_what_is_planned_for_it(stage: int, cases: list[Case]) -> None:
    of_ranks = run_ranks(measure, 2, stage, cases, limit=500)
    for case, *results in zip(cases, *of_ranks, strict=True):
        assert list(results[0]) == ["forward", "loss", "backward", "optimizer_step"]
        for phase, (planned, _) in results[0].items():
            # Which gradients a rank keeps, and so when it needs most, differs; the plan is for the one that needs more.
            assert planned == pytest.approx(max(alive[phase][1] for alive in results), rel=0.05), (case, phase)

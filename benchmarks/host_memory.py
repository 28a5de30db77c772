"""What a rank's process grows by, against the plan: torchrun --standalone --nproc_per_node 2 -m benchmarks.host_memory

On a CPU host and device are one memory, and nothing is pinned, so that it is all that a plan has but its reserve. A
small Llama, bf16, AdamW and ZeRO: resident memory when the engine is built, between steps, and at the end of a forward.
Buffers of NVMe are locked memory there too: --nvme_path says where its files go, and needs libaio-dev.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import deepspeed
import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from mst_ds import apply_plan, make_plan
from mst_ds.config import TrainConfig
from mst_ds.data import shard
from mst_ds.engine.jit_build import build_shared_memory_collective, guard_builds
from mst_ds.engine.optimizer import make_optimizer
from mst_ds.memory.phases import planned_bytes
from mst_ds.planner import Plan
from mst_ds.training.loop import train_step
from mst_ds.zero import read_zero

MIB = 2**20
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
# A sub-group is about a fifth of a rank's shard; of the parameters a quarter stays on the host.
NVME_OPTIMIZER = {"offload_optimizer": {"device": "nvme"}, "sub_group_size": 3_000_000}
NVME_ALL = NVME_OPTIMIZER | {"offload_param": {"device": "nvme", "buffer_size": 4_100_000, "max_in_cpu": 4_000_000}}
KEPT_ON_HOST = {"recompute": True, "keep_attention": True, "offload_activations": True, "mlp_chunks": 8}
CASES: dict[str, tuple[int, int, dict[str, Any], dict[str, Any]]] = {  # stage, length, zero_optimization, "mst"
    "stage 1": (1, 512, OFFLOAD_OPTIMIZER, {}),
    "stage 2": (2, 512, OFFLOAD_OPTIMIZER, {}),
    "stage 3": (3, 512, OFFLOAD_OPTIMIZER, {}),
    "stage 3, parameters too": (3, 512, OFFLOAD_ALL, {}),
    "stage 3, activations too": (3, 8192, OFFLOAD_ALL, KEPT_ON_HOST | {"loss_chunks": 32}),
    "NVMe, optimizer": (3, 512, NVME_OPTIMIZER, {}),
    "NVMe, parameters too": (3, 512, NVME_ALL, {}),
}
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)


def resident_bytes() -> int:
    """Of this process, once what is free has gone back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


def measure(rank: int, case: str, nvme_path: str | None = None) -> dict[str, tuple[int, int]]:
    """Bytes that were planned, and by which the process has grown; a collective call.

    Returns:
        By moment: "engine built"; "between steps", after the second; "end of the forward", of the second.
    """
    # Each tensor a mapping of its own: of the heap, a freed tensor below one in use would stay resident.
    ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 65536)
    stage, seq_len, zero, mst = CASES[case]
    zero = {name: {**value, "nvme_path": nvme_path} if _is_on_nvme(value) else value for name, value in zero.items()}
    # What is loaded on first use, kernels and collectives, is no memory of the plan's.
    _steps(rank, SMALL, stage, 64, zero, mst)
    return _steps(rank, LARGE, stage, seq_len, zero, mst)


def _is_on_nvme(value: object) -> bool:
    return isinstance(value, Mapping) and value.get("device") == "nvme"


def _steps(
    rank: int, sizes: dict[str, Any], stage: int, seq_len: int, zero: dict[str, Any], mst: dict[str, Any]
) -> dict[str, tuple[int, int]]:
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
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
    # transformers looks for it, by a weak reference, to shard weights as it makes them.
    at_stage_3 = HfDeepSpeedConfig(ds_config) if stage == 3 else None
    model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    apply_plan(model.train(), plan)
    optimizer = make_optimizer(model, TrainConfig(), read_zero(ds_config, dp_world_size=2))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    built = resident_bytes()
    ids = torch.randint(2, config.vocab_size, (1, seq_len))
    batch = shard({"input_ids": ids, "labels": ids}, plan.topology, layer_chunks=plan.settings.layer_chunks)
    at_forwards_end = []
    hook = engine.module.model.register_forward_hook(lambda *_: at_forwards_end.append(resident_bytes()))
    for _ in range(2):
        train_step(engine, [batch])
    after = resident_bytes()
    hook.remove()
    engine.destroy()
    del at_stage_3
    planned = {phase.name: planned_bytes(phase, torch.device("cpu")) for phase in plan.phases}
    return {
        "engine built": (planned["initialisation"] - _moments(plan), built - before),
        "between steps": (planned["initialisation"], after - before),
        "end of the forward": (planned["forward"], at_forwards_end[-1] - before),
    }


def _moments(plan: Plan) -> int:
    """What the optimizer makes in its first step, and not on NVMe."""
    made = ("optimizer_moments", "optimizer_moments_on_host")
    return sum(term.bytes for term in plan.phases[0].terms if term.place != "nvme" and term.name in made)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="stage 3, parameters too")
    parser.add_argument("--nvme_path", help="A folder for the files of NVMe.")
    options = parser.parse_args(argv)
    guard_builds()
    build_shared_memory_collective()
    deepspeed.init_distributed(verbose=False)
    found = measure(dist.get_rank(), options.case, options.nvme_path)
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, found)
    if dist.get_rank() == 0:
        _print(options.case, results)
    dist.destroy_process_group()
    return 0


def _print(case: str, results: list[dict[str, tuple[int, int]]]) -> None:
    table = Table("rank", "moment", "planned MiB", "grown MiB", "difference", title=case)
    for rank, found in enumerate(results):
        for moment, (planned, grown) in found.items():
            more = f"{grown / planned - 1:+.1%}"
            table.add_row(str(rank), moment, f"{planned / MIB:.1f}", f"{grown / MIB:.1f}", more)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())

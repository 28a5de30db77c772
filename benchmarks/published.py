"""Steps that others have published, beside what is predicted for them: python -m benchmarks.published

Each with the kernels and switches that it ran with, where these are known, and what is known of its machine. A step of
FSDP is one of ZeRO-3; its recompute of whole layers is `recompute` with attention run again.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from rich.table import Table
from transformers import LlamaConfig

from mst_ds.command_line.entry_point import console
from mst_ds.gpus import Gpu, gpu_by_name
from mst_ds.planner import plan_of_request, read_request
from mst_ds.planner.cost import step_seconds
from mst_ds.planner.rates import rates_of

_ALWAYS = {"attention": "flash_attention_2", "layer_chunks": 1}
_RECOMPUTE = {"recompute": True, "keep_attention": False, "keep_mlp": False, "offload_activations": False}
_NO_RECOMPUTE = {"recompute": False, "keep_mlp": True}


@dataclass(frozen=True)
class Layout:
    """seq_len: tokens of a sequence. shards: ranks of ZeRO-3, where a hybrid shards within a node; else all."""

    model: Any
    gpu: Gpu
    gpus: int
    seq_len: int
    micro_batch: int = 1
    sp_size: int = 1
    shards: int | None = None


@dataclass(frozen=True)
class Published:
    """A step of so many seconds.

    Attributes:
        source: of it, which has its tokens a second.
        fused: whether norms, rotary embedding and MLPs were fused kernels.
        mst, zero: switches, as a DeepSpeed JSON has them.
    """

    name: str
    source: str
    layout: Layout
    seconds: float
    fused: bool = False
    mst: dict[str, Any] = field(default_factory=_NO_RECOMPUTE.copy)
    zero: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Of the predicted time to the published one."""
        return self.predicted() / self.seconds

    def predicted(self) -> float:
        """Seconds of the step."""
        layout = self.layout
        ranks = layout.shards or layout.gpus
        # Memory is no limit: the switches are as they were.
        request = read_request(
            layout.model,
            {
                "bf16": {"enabled": True},
                "train_micro_batch_size_per_gpu": layout.micro_batch,
                "zero_optimization": {"stage": 3, "overlap_comm": True, **self.zero},
                "mst": {**_ALWAYS, "sp_size": layout.sp_size, **self.mst},
            },
            world_size=ranks,
            seq_len=layout.seq_len,
            device_memory=2**50,
            host_memory=2**50,
            ranks_per_node=8,
            gpu=layout.gpu,
        )
        work = request.work.with_settings(**plan_of_request(request).settings.__dict__)
        seconds = step_seconds(work, layout.gpu, fused=self.fused)
        if layout.shards is not None:
            # A hybrid averages each shard's gradients over the nodes.
            shard = work.zero.dtype_bytes * work.shape.parameter_count / layout.shards
            seconds += 2 * shard / rates_of(work, layout.gpu).network
        return seconds


def _llama(hidden: int, layers: int, heads: int, inner: int, key_value_heads: int, vocabulary: int = 32000) -> Any:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        num_key_value_heads=key_value_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2**22,
    )


_7B, _13B = _llama(4096, 32, 32, 11008, 32), _llama(5120, 40, 40, 13824, 40)
_34B, _70B = _llama(8192, 48, 64, 22016, 8), _llama(8192, 80, 64, 28672, 8)
_LLAMA3_8B, _LLAMA3_70B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-70B"
_FMS = "github.com/foundation-model-stack/fms-fsdp, README.md, 128 A100"
_TITAN = "github.com/pytorch/torchtitan, docs/performance.md, 64 A100"
_TITAN_8 = "github.com/pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"

# "HBM2e with 2.4 TB/s", 500 W, and a peak "between SXM and NVL": the lower one.
_H100_500W = replace(gpu_by_name("H100"), flops=gpu_by_name("H100-NVL").flops, memory_rate=2.4e12)
_A100 = gpu_by_name("A100-80GB")

PUBLISHED = (
    Published(
        "ALST, Llama 3.1 8B, 3.7M tokens on 8 H100",
        "arXiv 2506.13996",
        Layout(_LLAMA3_8B, gpu_by_name("H100"), 8, 3_700_000, sp_size=8),
        6455.0,
        fused=True,
        mst={**_RECOMPUTE, "offload_activations": True, "mlp_chunks": 64, "loss_chunks": 64},
        zero={"offload_optimizer": {"device": "cpu"}},
    ),
    Published("fms-fsdp, Llama 2 7B", _FMS, Layout(_7B, _A100, 128, 4096, 2, shards=8), 2 * 4096 / 3760),
    Published("fms-fsdp, Llama 2 13B", _FMS, Layout(_13B, _A100, 128, 4096, shards=8), 4096 / 1700),
    Published("fms-fsdp, Llama 34B", _FMS, Layout(_34B, _A100, 128, 4096, 8), 8 * 4096 / 772, mst=_RECOMPUTE),
    Published("fms-fsdp, Llama 2 70B", _FMS, Layout(_70B, _A100, 128, 4096, 6), 6 * 4096 / 380, mst=_RECOMPUTE),
    Published("torchtitan, Llama 3 70B", _TITAN, Layout(_LLAMA3_70B, _A100, 64, 8192), 8192 / 331, mst=_RECOMPUTE),
    # Half of the matrix products are computed again in these, which no switch says.
    Published("torchtitan, Llama 3 8B", _TITAN, Layout(_LLAMA3_8B, _A100, 64, 8192), 8192 / 2973),
    Published("torchtitan, Llama 3.1 8B", _TITAN_8, Layout(_LLAMA3_8B, _H100_500W, 8, 8192, 2), 2 * 8192 / 5762),
    Published(
        "torchtitan, Llama 3.1 8B, compiled",
        _TITAN_8,
        Layout(_LLAMA3_8B, _H100_500W, 8, 8192, 2),
        2 * 8192 / 6667,
        fused=True,
    ),
)


def main() -> None:
    table = Table("step", "published s", "predicted s", "ratio", "source")
    for each in PUBLISHED:
        table.add_row(each.name, f"{each.seconds:.4g}", f"{each.predicted():.4g}", f"{each.ratio:.2f}", each.source)
    console().print(table)


if __name__ == "__main__":
    main()

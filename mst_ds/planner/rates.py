"""What a GPU attains of its data sheet, for each kind of work: the rates that predict a step's time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mst_ds.gpus import CPU, Gpu
from mst_ds.planner.flops import attention_forward_flops, windowed_attention_flops
from mst_ds.planner.workload import Workload

# Kernels of attention. blocks: none, products and a softmax of plain operators.
Kernel: TypeAlias = Literal["flash 2", "flash 3", "flash 4", "cudnn", "blocks"]


@dataclass(frozen=True)
class Rates:
    """Of one rank.

    Attributes:
        matrices, attention_forward, attention_backward: FLOP/s.
        passes: bytes/s of operators that only read and write their tensors.
        launch_seconds: what the CPU takes for a kernel; it runs ahead of the device, which waits only where its own
            work is shorter.
        node, network: bytes/s of collectives, one way, to ranks of the node and to others.
    """

    matrices: float
    attention_forward: float
    attention_backward: float
    passes: float
    launch_seconds: float
    node: float
    network: float


# Shares of a data sheet's FLOP/s, by the first number of a CUDA capability. Matrices: products of a decoder's sizes in
# steps that last, so that the published steps of benchmarks/published.py come out right: 225 of an A100's 312 TFLOP/s,
# 613 of an H100's 989. On newer ones assumed.
_MATRICES: Mapping[int, float] = {8: 0.72, 9: 0.62, 10: 0.6}
# Forward and backward with heads of 128 under a causal mask, whose masked half is not counted. On an H100 flash 3
# attains 616 TFLOP/s forward, flash 2 by 1.5 to 2 times less, backward by 1.5 to 1.75, and cuDNN a little less than
# flash 3 (arXiv 2407.08608, section 4.1). On newer GPUs flash 2 has no kernels of its own; what others attain there is
# assumed to be the same share.
_ATTENTION: Mapping[int, Mapping[Kernel, tuple[float, float]]] = {
    8: {"flash 2": (0.61, 0.53)},
    9: {"flash 2": (0.38, 0.31), "flash 3": (0.62, 0.54), "cudnn": (0.6, 0.5)},
    10: {"flash 2": (0.17, 0.14), "flash 4": (0.6, 0.5), "cudnn": (0.6, 0.5)},
}
# Assumed of what has no row: a product of its own for every score, or fp32.
_UNKNOWN = 0.6
# A CPU's, of the rate of its matrix products: attention 60 of 113 GFLOP/s.
_CPU_ATTENTION = 0.53
_BLOCKS = 0.1
# Of heads of 64: 475 of 616 TFLOP/s (arXiv 2407.08608, figure 5).
_NARROW_HEAD, _SHARE_OF_NARROW = 64, 0.77
# Of a data sheet's bytes/s: copies on the device, and NCCL's collectives.
_PASSES = 0.8
_LINKS = 0.8
_LAUNCH_SECONDS = 8e-6


def rates_of(work: Workload, gpu: Gpu) -> Rates:
    """What this GPU attains in the dtype and with the attention of this work."""
    flops = gpu.fp32_flops if work.zero.dtype == "fp32" else gpu.flops
    forward, backward = _attention_shares(work, gpu)
    return Rates(
        matrices=_matrix_share(work, gpu) * flops,
        attention_forward=forward * flops,
        attention_backward=backward * flops,
        passes=_PASSES * gpu.memory_rate,
        launch_seconds=_LAUNCH_SECONDS,
        node=_LINKS * gpu.node_rate,
        network=_LINKS * gpu.network_rate,
    )


def attention_kernel(work: Workload, gpu: Gpu) -> Kernel:
    """The kernel that `mst_ds.attention.choice` takes for one document, or the several of a sample, where most of what
    attention computes is, with a window or without."""
    if work.is_blockwise or not work.has_flash:
        return "blocks"
    if work.settings.attention != "sdpa":
        of_package: dict[str, Kernel] = {"flash_attention_3": "flash 3", "flash_attention_4": "flash 4"}
        return of_package.get(work.settings.attention, "flash 2")
    is_plain = work.sequences_per_sample == 1 and 2 * windowed_attention_flops(work) <= attention_forward_flops(work)
    takes_cudnn = gpu.capability[0] in (9, 10) and work.kernel_head_dim <= 128 and is_plain
    return "cudnn" if takes_cudnn else "flash 2"


def _matrix_share(work: Workload, gpu: Gpu) -> float:
    if gpu.name == CPU.name:
        return 1.0
    return _UNKNOWN if work.zero.dtype == "fp32" else _MATRICES.get(gpu.capability[0], _UNKNOWN)


def _attention_shares(work: Workload, gpu: Gpu) -> tuple[float, float]:
    if gpu.name == CPU.name:
        return _CPU_ATTENTION, _CPU_ATTENTION
    if work.zero.dtype == "fp32":
        return _UNKNOWN, _UNKNOWN
    kernel = attention_kernel(work, gpu)
    if kernel == "blocks":
        return _BLOCKS, _BLOCKS
    forward, backward = _ATTENTION.get(gpu.capability[0], {}).get(kernel, (_UNKNOWN, _UNKNOWN))
    share = _SHARE_OF_NARROW if work.kernel_head_dim <= _NARROW_HEAD else 1.0
    return share * forward, share * backward

"""Which kernel computes attention: by the name that a user gave, the device, the dtype and what a layer asks for.

The rules and where they come from:

- On the CPU torch has flash attention without dropout.
- On CUDA, from compute capability 8.0 on, flash attention takes 16 bits, heads up to 256 wide (not 193 to 224 on
  devices with little shared memory, nor above with dropout), a window and packed documents, in one call for all rows.
  `has_flash_attention` is asked by plans, too.
- cuDNN is what torch prefers from compute capability 9.0 on, where it is the faster (torch 2.11,
  `check_prefer_cudnn_attention`). It is used where every row is one document: it makes a plan for each new length,
  which takes tens of milliseconds (pytorch#191576). Before 9.15.1 it is wrong for lengths that are no multiple of 128
  (pytorch#169849), and some versions have no dropout. It knows dropout in steps of 1/16 only, has nothing for one
  token, and its backward is not deterministic (torch's `sdp_utils.cpp`).
- Who asks for flash attention gets it: the package flash-attn 2, 3 and 4 by way of torch, or 2 and 3 from the hub.
- For fp32 and wider heads CUDA has the memory-efficient kernel, in fp64 none.
- Of the kernels on CUDA the memory-efficient one alone takes a mask, which picked keys need.
- No kernel of torch has a softcap; the package flash-attn 2 and the hub's kernels have one, and not with dropout.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mst_ds.geometry import has_flash_attention

from .blockwise import Blockwise
from .documents import Documents
from .flash import Flash3Package, FlashPackage, TorchFlash
from .hub_kernels import FLASH_2_OF_HUB, FLASH_3_OF_HUB
from .indexed import Indexed
from .kernel import BlockKernel, Kernel
from .over_blocks import AllKeys, OverBlocks
from .per_document import PerDocument
from .spec import AttentionSpec
from .torch_kernels import CpuFlash, Cudnn, Efficient

_WIDEST_CUDNN_HEAD = 128
_FIRST_RIGHT_CUDNN = 91501
_CUDNN_DROPOUT_STEPS = 16


@dataclass(frozen=True)
class CudaDevice:
    """capability: of CUDA. cudnn: its version, such as 91501; None where there is none."""

    capability: tuple[int, int]
    cudnn: int | None


@cache
def cuda_device(device: torch.device) -> CudaDevice:
    """The device's own numbers."""
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return CudaDevice(torch.cuda.get_device_capability(device), cudnn)


def choose_kernel(
    name: str, query: Tensor, spec: AttentionSpec, documents: Documents, masks: dict[tuple[object, ...], Tensor]
) -> Kernel:
    """The kernel for a layer's query (B, n, S, D), whose width keys and values have too.

    Args:
        name: of the setting "attention".
        masks: of windows, shared by all layers.

    Raises:
        ValueError: flash attention 3 or 4 with dropout.
    """
    flash = _flash_kernel(name, query, (query.shape[2],), spec, documents, is_causal=True)
    if flash is not None:
        return flash
    block = _block_kernel(query, spec)
    return PerDocument(Blockwise() if block is None else OverBlocks(block, masks))


def choose_indexed_kernel(
    name: str,
    query: Tensor,
    spec: AttentionSpec,
    documents: Documents,
    masks: dict[tuple[object, ...], Tensor],
    picks: Tensor,
) -> Kernel:
    """The same for a layer whose queries see those keys alone that an indexer has picked.

    Args:
        picks: (B, S, k), see `Indexed`.

    Raises:
        ValueError: a window, or no kernel takes a mask with what the layer asks for.
    """
    if not documents.has_longer(picks.shape[2], query.shape[2]):
        return choose_kernel(name, query, spec, documents, masks)
    # On CUDA the memory-efficient kernel alone takes a mask.
    block = Efficient() if query.is_cuda and query.dtype != torch.float64 else _block_kernel(query, spec)
    if block is None or spec.softcap is not None or spec.window is not None:
        raise ValueError(
            "attention to picked keys is not there with a window, with a softcap, with dropout on the CPU, or in "
            "float64 on CUDA: leave that out"
        )
    return Indexed(choose_kernel(name, query, spec, Documents(), masks), block, picks)


def choose_block_kernel(name: str, query: Tensor, keys: int, spec: AttentionSpec, documents: Documents) -> Kernel:
    """The kernel for queries (B, n, S, D) that all see all of a block's keys.

    Args:
        name: of the setting "attention".
        keys: how many the block has.
        spec: of the layer, without a window.
        documents: of the batch: where several lie in a row, the lengths of blocks are many.

    Raises:
        ValueError: flash attention 3 or 4 with dropout.
    """
    flash = _flash_kernel(name, query, (query.shape[2], keys), spec, documents, is_causal=False)
    if flash is not None:
        return flash
    block = _block_kernel(query, spec)
    return PerDocument(Blockwise(is_causal=False) if block is None else AllKeys(block))


def _flash_kernel(
    name: str, query: Tensor, lengths: tuple[int, ...], spec: AttentionSpec, documents: Documents, *, is_causal: bool
) -> Kernel | None:
    """Flash attention on CUDA, where it is there and the best."""
    if not _is_flash(query, spec):
        return None
    if name in ("flash_attention_2", FLASH_2_OF_HUB) and not (spec.softcap is not None and spec.dropout):
        return FlashPackage(name, is_causal)
    if name in FLASH_3_OF_HUB and not spec.dropout:
        return Flash3Package(name, is_causal)
    if spec.softcap is not None:
        return None
    if spec.dropout and name in ("flash_attention_3", "flash_attention_4", *FLASH_3_OF_HUB):
        raise ValueError(f'attention "{name}" has no dropout, and a layer asks for {spec.dropout}: use "sdpa"')
    return None if name == "sdpa" and _prefers_cudnn(query, lengths, spec, documents) else TorchFlash(is_causal)


def _is_flash(query: Tensor, spec: AttentionSpec) -> bool:
    return query.is_cuda and has_flash_attention(
        query.itemsize, query.shape[3], cuda_device(query.device).capability, has_dropout=spec.dropout > 0
    )


def _block_kernel(query: Tensor, spec: AttentionSpec) -> BlockKernel | None:
    """None where torch has no kernel, and would build the S x S scores."""
    if spec.softcap is not None:
        return None
    if not query.is_cuda:
        return None if spec.dropout else CpuFlash()
    if _is_flash(query, spec):
        return Cudnn()
    return None if query.dtype == torch.float64 else Efficient()


def _prefers_cudnn(query: Tensor, lengths: tuple[int, ...], spec: AttentionSpec, documents: Documents) -> bool:
    """lengths: of queries and, where there are more or fewer of them, keys."""
    of_device = cuda_device(query.device)
    if of_device.cudnn is None or of_device.capability[0] not in {9, 10} or not torch.backends.cuda.cudnn_sdp_enabled():
        return False
    is_even = all(length % 128 == 0 for length in lengths)
    is_right = of_device.cudnn >= _FIRST_RIGHT_CUDNN or (is_even and not spec.dropout)
    if not is_right or 1 in lengths or not (spec.dropout * _CUDNN_DROPOUT_STEPS).is_integer():
        return False
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return False
    return documents.are_rows and spec.window is None and query.shape[3] <= _WIDEST_CUDNN_HEAD

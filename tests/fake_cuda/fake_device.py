"""What a CPU build of torch lacks of CUDA, beside what `device_guard.cpp` gives it: for tensors without data only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mst_ds.minisequence import chunks

ATEN = torch.ops.aten
_GENERATOR = torch.Generator


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that torch takes for it on CUDA; a CPU build knows no way there."""
    assert query.shape[3] == key.shape[3] == value.shape[3]
    assert query.shape[3] % 8 == 0
    assert enable_gqa or query.shape[1] == key.shape[1]
    if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16) and query.shape[3] <= 256:
        return ATEN._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    assert query.dtype != torch.float64, "torch would build the S x S scores"
    assert query.shape[1] == key.shape[1], "torch would build the S x S scores"
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    return ATEN._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def hopper() -> Iterator[None]:
    """An H100 with a torch that has every product, as far as anybody asks. Streams are torch's own, of the guard."""
    products = chunks.ProductsInFp32(added=True, alone=True)
    # By name: what it stands for in torch.cuda.
    cuda = {
        "_lazy_init": lambda: None,  # Tensor.record_stream calls it
        "Stream": lambda device=None, **_: torch.Stream(device=device or "cuda"),
        "current_stream": lambda device=None: torch.accelerator.current_stream(),
        "stream": lambda stream: nullcontext() if stream is None else stream,
        "get_rng_state": lambda device=None: torch.empty(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
    }
    with ExitStack() as stack:
        for name, stand_in in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        # Asked of the device once a process, by computing.
        stack.enter_context(patch.object(chunks, "products_in_fp32", lambda device, dtype: products))
        stack.enter_context(patch.object(torch, "Generator", lambda device="cpu": _GENERATOR()))
        # By name: the thread of a device's backward knows no function modes.
        for module in [module for name, module in sys.modules.items() if name.startswith("mst_ds.")]:
            if getattr(module, "scaled_dot_product_attention", None) is scaled_dot_product_attention:
                stack.enter_context(patch.object(module, "scaled_dot_product_attention", _attention))
        yield

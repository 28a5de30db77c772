"""What kernels of CUDA are handed, and what is made of their results, with dense arithmetic in their place."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from cuda_on_cpu import CudaOnCpu, cuda_on_cpu, flash_package_on_cpu, hub_on_cpu
from dense_attention import dense_attention, heads
from in_chunks import attend_in_chunks
from torch import Tensor

from mst_ds.attention import AttentionSpec, CausalAttention, Documents
from mst_ds.attention.flash import Flash3Package, FlashPackage, TorchFlash
from mst_ds.attention.hub_kernels import FLASH_2_OF_HUB, FLASH_3_OF_HUB
from mst_ds.attention.kernel import Kernel
from mst_ds.attention.over_blocks import AllKeys, OverBlocks
from mst_ds.attention.per_document import PerDocument
from mst_ds.attention.torch_kernels import Cudnn, Efficient

# fp64, sums of some tens of terms.
EXACT = {"rtol": 1e-12, "atol": 1e-13}
LENGTH = 24
STARTS = [[0, 7, 20], [0, 23]]


def run_kernel(kernel: Kernel, tensors: list[Tensor], grad: Tensor, spec: AttentionSpec, starts: Any) -> list[Tensor]:
    documents, given = Documents(starts), [tensor.detach() for tensor in tensors]
    attended = kernel.forward(*given, spec, documents)
    assert attended.log_sum_exp.shape == attended.output.shape[:3]
    return [attended.output, *kernel.backward(grad, *given, attended, spec, documents)]


def truth(tensors: list[Tensor], grad: Tensor, starts: Any, **asked: Any) -> list[Tensor]:
    """For the last queries, as many as there are."""
    query, key, value = tensors
    padded = torch.nn.functional.pad(query, (0, 0, key.shape[2] - query.shape[2], 0))
    output = dense_attention(padded, key, value, scaling=0.3, starts=starts, **asked).transpose(1, 2)
    output = output[:, :, -query.shape[2] :]
    return [output, *torch.autograd.grad(output, tensors, grad)]


CASES: dict[str, tuple[Kernel, AbstractContextManager[CudaOnCpu], str, tuple[str, ...]]] = {
    "torch's flash": (TorchFlash(), cuda_on_cpu, "flash", ("window",)),
    "flash-attn": (FlashPackage("flash_attention_2"), flash_package_on_cpu, "flash", ("window", "softcap")),
    "flash-attn 2 of the hub": (FlashPackage(FLASH_2_OF_HUB), hub_on_cpu, "flash", ("window", "softcap")),
    **{name: (Flash3Package(name), hub_on_cpu, "flash", ("window", "softcap")) for name in FLASH_3_OF_HUB},
    "efficient": (PerDocument(OverBlocks(Efficient())), cuda_on_cpu, "efficient", ("window",)),
    "cuDNN": (PerDocument(OverBlocks(Cudnn())), cuda_on_cpu, "cudnn", ()),
}
ASKED: list[dict[str, Any]] = [{}, {"window": 5}, {"softcap": 1.5}, {"window": 5, "softcap": 1.5}]


@pytest.mark.parametrize("queries", [LENGTH, 9], ids=["all queries", "the last queries"])
@pytest.mark.parametrize("starts", [None, STARTS, [[0, 11]]], ids=["one document", "documents", "alike"])
@pytest.mark.parametrize(
    ("name", "asked"),
    [(name, asked) for name, (*_, able) in CASES.items() for asked in ASKED if set(asked) <= set(able)],
    ids=str,
)
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: dict[str, Any], starts: Any, queries: int
) -> None:
    monkeypatch.setattr("mst_ds.geometry._WINDOW_QUERIES", 4)  # so that a window has several blocks
    kernel, installed, runs, _ = CASES[name]
    torch.manual_seed(0)
    tensors = heads(4, 2, 2, length=LENGTH)
    tensors[0] = tensors[0][:, :, :queries].detach().requires_grad_()
    grad = torch.randn(2, 4, queries, 8, dtype=torch.float64)
    with installed() as kernels:
        found = run_kernel(kernel, tensors, grad, AttentionSpec(0.3, **asked), starts)
    torch.testing.assert_close(found, truth(tensors, grad, starts and starts * (3 - len(starts)), **asked), **EXACT)
    assert kernels.calls[f"{runs} forward"] == kernels.calls[f"{runs} backward"] >= 1
    if runs == "flash":
        assert kernels.calls == {"flash forward": 1, "flash backward": 1}


BLOCK_KERNELS: dict[str, Kernel] = {
    "torch's flash": TorchFlash(is_causal=False),
    "flash-attn": FlashPackage("flash_attention_2", is_causal=False),
    "flash-attn 2 of the hub": FlashPackage(FLASH_2_OF_HUB, is_causal=False),
    **{name: Flash3Package(name, is_causal=False) for name in FLASH_3_OF_HUB},
    "efficient": PerDocument(AllKeys(Efficient())),
    "cuDNN": PerDocument(AllKeys(Cudnn())),
}


# Each chunk's own documents are one call. A block is one for all rows alike, or for each row that sees it.
@pytest.mark.parametrize(
    ("starts", "calls"),
    [(None, 3 + 2 + 3), ([[0, 11]], 3 + 2 + 2), (STARTS, 3 + (1 + 2) + (2 + 3))],
    ids=["one document", "alike", "documents"],
)
@pytest.mark.parametrize(
    ("name", "asked"),
    [(name, asked) for name, (*_, able) in CASES.items() for asked in ASKED[:3] if set(asked) <= set(able)],
    ids=str,
)
def test_values_and_gradients_of_chunks(
    monkeypatch: pytest.MonkeyPatch, name: str, asked: dict[str, Any], starts: Any, calls: int
) -> None:
    monkeypatch.setattr("mst_ds.geometry._WINDOW_QUERIES", 4)
    kernel, installed, runs, _ = CASES[name]
    monkeypatch.setattr("mst_ds.attention.attend.choose_kernel", lambda *_: kernel)
    monkeypatch.setattr("mst_ds.attention.chunk.choose_block_kernel", lambda *_: BLOCK_KERNELS[name])
    torch.manual_seed(0)
    tensors = heads(4, 2, 2, length=LENGTH)
    grad = torch.randn(2, 4, LENGTH, 8, dtype=torch.float64)
    attention, spec = CausalAttention("sdpa", Documents(starts)), AttentionSpec(0.3, **asked)
    with installed() as kernels:
        output, _, *grads = attend_in_chunks(attention, tensors, grad, spec, [0, 9, 16, LENGTH], 6)
    expected = truth(tensors, grad, starts and starts * (3 - len(starts)), **asked)
    torch.testing.assert_close([output, *grads], expected, **EXACT)
    assert kernels.calls[f"{runs} forward"] == kernels.calls[f"{runs} backward"]
    if runs == "flash":
        assert kernels.calls["flash forward"] == (3 if "window" in asked else calls)

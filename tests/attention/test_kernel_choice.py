"""Which kernel is chosen, for a device that need not be there."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from mst_ds.attention import AttentionSpec, Documents, choice, prepare_attention
from mst_ds.attention.choice import CudaDevice, choose_block_kernel, choose_kernel
from mst_ds.attention.hub_kernels import HUB_KERNELS
from mst_ds.attention.over_blocks import AllKeys, OverBlocks
from mst_ds.attention.per_document import PerDocument
from mst_ds.config import ATTENTION_IMPLEMENTATIONS, GIB, SOFTCAP_ATTENTION
from mst_ds.config_parser import parse_train_config
from mst_ds.dtypes import DTYPES
from mst_ds.engine import Launch, preparation
from mst_ds.gpus import DEFAULT_GPU
from mst_ds.model_shape import ModelShape
from mst_ds.planner import read_request, request

H100, OLD_CUDNN = CudaDevice((9, 0), 91501), CudaDevice((9, 0), 91002)
A100, RTX_4090 = CudaDevice((8, 0), 91501), CudaDevice((8, 9), 91501)
ORIN, T4 = CudaDevice((8, 7), 91501), CudaDevice((7, 5), 91501)
PACKED = Documents([[0, 3]])


def chosen(
    monkeypatch: pytest.MonkeyPatch,
    device: CudaDevice | None,
    *,
    name: str = "sdpa",
    dtype: torch.dtype = torch.bfloat16,
    length: int = 256,
    width: int = 128,
    keys: int | None = None,
    documents: Documents | None = None,
    **asked: Any,
) -> str:
    """The name of the kernel, or of the kernel of its blocks; keys: those of a block that has no mask."""
    monkeypatch.setattr(choice, "cuda_device", lambda _: device)
    with FakeTensorMode():
        query = torch.empty(1, 4, length, width, dtype=dtype, device="cpu" if device is None else "cuda")
    spec, documents = AttentionSpec(0.1, **asked), documents or Documents()
    kernel: Any
    if keys is None:
        kernel = choose_kernel(name, query, spec, documents, {})
    else:
        kernel = choose_block_kernel(name, query, keys, spec, documents)
    while isinstance(kernel, PerDocument | OverBlocks | AllKeys):
        kernel = kernel.kernel
    return type(kernel).__name__


@pytest.mark.parametrize(
    ("device", "asked", "kernel"),
    [
        (None, {}, "CpuFlash"),
        (None, {"dtype": torch.float64, "window": 5, "documents": PACKED}, "CpuFlash"),
        (None, {"dropout": 0.1}, "Blockwise"),
        (None, {"softcap": 1.0, "name": "flash_attention_2"}, "Blockwise"),
        (H100, {}, "Cudnn"),
        (H100, {"dropout": 0.125}, "Cudnn"),
        # cuDNN would round it to a multiple of 1/16.
        (H100, {"dropout": 0.1}, "TorchFlash"),
        (H100, {"length": 1}, "TorchFlash"),
        # One call for all documents, whatever their lengths; a window without a mask.
        (H100, {"documents": PACKED}, "TorchFlash"),
        (H100, {"documents": Documents([[0]])}, "Cudnn"),
        (H100, {"window": 5}, "TorchFlash"),
        (H100, {"width": 136}, "TorchFlash"),
        (H100, {"width": 264}, "Efficient"),
        (H100, {"dtype": torch.float32, "window": 5}, "Efficient"),
        (H100, {"dtype": torch.float64}, "Blockwise"),
        (H100, {"softcap": 1.0}, "Blockwise"),
        (H100, {"name": "flash_attention_2"}, "FlashPackage"),
        (H100, {"name": "flash_attention_2", "softcap": 1.0}, "FlashPackage"),
        (H100, {"name": "flash_attention_2", "softcap": 1.0, "dropout": 0.1}, "Blockwise"),
        (H100, {"name": "flash_attention_2", "dtype": torch.float32}, "Efficient"),
        (H100, {"name": "flash_attention_3"}, "TorchFlash"),
        (H100, {"name": HUB_KERNELS[0]}, "FlashPackage"),
        (H100, {"name": HUB_KERNELS[0], "softcap": 1.0, "dropout": 0.1}, "Blockwise"),
        (H100, {"name": HUB_KERNELS[1], "window": 5}, "Flash3Package"),
        (H100, {"name": HUB_KERNELS[2], "documents": PACKED}, "Flash3Package"),
        (H100, {"name": HUB_KERNELS[1], "softcap": 1.0, "dropout": 0.1}, "Blockwise"),
        (H100, {"name": HUB_KERNELS[1], "dtype": torch.float32}, "Efficient"),
        (OLD_CUDNN, {}, "Cudnn"),
        (OLD_CUDNN, {"length": 255}, "TorchFlash"),
        (OLD_CUDNN, {"dropout": 0.125}, "TorchFlash"),
        (CudaDevice((9, 0), None), {}, "TorchFlash"),
        (A100, {}, "TorchFlash"),
        (A100, {"width": 256}, "TorchFlash"),
        (RTX_4090, {"width": 256}, "TorchFlash"),
        (RTX_4090, {"width": 256, "dropout": 0.1}, "Efficient"),
        (RTX_4090, {"width": 208}, "Efficient"),
        (ORIN, {"width": 208}, "Efficient"),
        (T4, {"dtype": torch.float16}, "Efficient"),
        (T4, {"dtype": torch.float16, "name": "flash_attention_2"}, "Efficient"),
    ],
    ids=str,
)
def test_the_kernel_for_a_device(
    monkeypatch: pytest.MonkeyPatch, device: CudaDevice | None, asked: dict[str, Any], kernel: str
) -> None:
    assert chosen(monkeypatch, device, **asked) == kernel


@pytest.mark.parametrize(
    ("device", "asked", "kernel"),
    [
        (None, {}, "CpuFlash"),
        (None, {"softcap": 1.0}, "Blockwise"),
        (None, {"dropout": 0.1}, "Blockwise"),
        (H100, {}, "Cudnn"),
        (H100, {"keys": 1}, "TorchFlash"),
        # Blocks that begin with a document are of many lengths.
        (H100, {"documents": PACKED}, "TorchFlash"),
        (H100, {"dtype": torch.float32}, "Efficient"),
        (H100, {"dtype": torch.float64}, "Blockwise"),
        (H100, {"name": "flash_attention_2", "softcap": 1.0}, "FlashPackage"),
        (H100, {"name": "flash_attention_3"}, "TorchFlash"),
        (H100, {"name": HUB_KERNELS[0]}, "FlashPackage"),
        (H100, {"name": HUB_KERNELS[1], "softcap": 1.0}, "Flash3Package"),
        (OLD_CUDNN, {}, "Cudnn"),
        (OLD_CUDNN, {"keys": 255}, "TorchFlash"),
        (A100, {}, "TorchFlash"),
        (RTX_4090, {"width": 208}, "Efficient"),
    ],
    ids=str,
)
def test_the_kernel_for_a_block_without_a_mask(
    monkeypatch: pytest.MonkeyPatch, device: CudaDevice | None, asked: dict[str, Any], kernel: str
) -> None:
    assert chosen(monkeypatch, device, **{"keys": 384, **asked}) == kernel


@pytest.mark.parametrize("device", [H100, A100, RTX_4090, T4], ids=str)
@pytest.mark.parametrize(("key_width", "value_width"), [(128, 128), (192, 128), (128, 200), (256, 256), (128, 264)])
@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize(
    ("dtype", "given", "package"),
    [
        ("bf16", "auto", None),
        ("bf16", "auto", "2.8.3"),
        ("bf16", "flash_attention_2", "2.8.3"),
        ("fp32", "auto", "2.8.3"),
    ],
)
def test_a_plan_counts_on_the_kernel_that_is_chosen(
    monkeypatch: pytest.MonkeyPatch,
    device: CudaDevice,
    key_width: int,
    value_width: int,
    softcap: float | None,
    dtype: str,
    given: str,
    package: str | None,
) -> None:
    monkeypatch.setattr(request, "flash_attn_2_version", lambda: package)
    shape = ModelShape.from_config(LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=key_width))
    shape = replace(shape, value_head_dim=value_width, has_attention_softcap=softcap is not None)
    ds_config = {"bf16": {"enabled": dtype == "bf16"}, "mst": {"attention": given}}
    gpu = replace(DEFAULT_GPU, capability=device.capability)
    work = read_request(shape, ds_config, world_size=1, seq_len=256, device_memory=GIB, gpu=gpu).work

    width, asked = max(key_width, value_width), {} if softcap is None else {"softcap": softcap}
    kernel = chosen(monkeypatch, device, name=work.settings.attention, dtype=DTYPES[dtype], width=width, **asked)
    assert work.is_blockwise == (kernel == "Blockwise")
    if not work.is_blockwise:
        assert work.has_flash == (kernel in {"Cudnn", "TorchFlash", "FlashPackage"})


def test_a_run_plans_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "rank_capability", lambda launch: T4.capability)
    flags = ["--seq_len", "64", "--preflight", "false"]
    run = preparation.prepare(parse_train_config(flags), Launch.from_environment({}))
    assert run.request.work.capability == T4.capability


@pytest.mark.parametrize("name", ["flash_attention_3", "kernels-community/flash-attn3"])
def test_flash_attention_3_has_no_dropout(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(ValueError, match=rf'"{name}" has no dropout, and a layer asks for 0\.1: use "sdpa"'):
        chosen(monkeypatch, H100, name=name, dropout=0.1)


def test_plans_know_which_names_have_a_softcap(monkeypatch: pytest.MonkeyPatch) -> None:
    blockwise = {
        name for name in ATTENTION_IMPLEMENTATIONS if chosen(monkeypatch, H100, name=name, softcap=1.0) == "Blockwise"
    }
    assert blockwise == {*ATTENTION_IMPLEMENTATIONS} - {*SOFTCAP_ATTENTION}


def test_cudnn_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert chosen(monkeypatch, H100) == "TorchFlash"


def test_deterministic_algorithms_exclude_cudnn() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert chosen(patch, H100) == "TorchFlash"
        patch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
        assert chosen(patch, H100) == "Cudnn"


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match="needs the package flash-attn, version 2: install it"):
        prepare_attention("flash_attention_2")
    for number in (3, 4):
        with pytest.raises(ValueError, match=f"needs the package flash-attn {number}, which torch does not find"):
            prepare_attention(f"flash_attention_{number}")
    monkeypatch.delattr(torch.nn.attention, "activate_flash_attention_impl")
    with pytest.raises(ValueError, match=r"needs torch 2\.11 or newer"):
        prepare_attention("flash_attention_3")
    known = ", ".join(ATTENTION_IMPLEMENTATIONS)  # of the setting
    with pytest.raises(ValueError, match=f"must be one of {known}; got 'eager'"):
        prepare_attention("eager")


@pytest.mark.parametrize("name", HUB_KERNELS)
def test_repositories_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hub = types.ModuleType("kernels")

    def offline(repo_id: str, *, version: int) -> Any:
        raise OSError("no network\nand many lines more")

    def forward_only(repo_id: str, *, version: int) -> Any:
        return types.SimpleNamespace(flash_attn_interface=types.SimpleNamespace(_flash_attn_forward=None))

    def something_else(repo_id: str, *, version: int) -> Any:
        return types.SimpleNamespace(flash_attn_func=None)

    monkeypatch.setitem(sys.modules, "kernels", None)
    with pytest.raises(ValueError, match=f'"{name}" needs the package kernels: install it'):
        prepare_attention(name)
    monkeypatch.setitem(sys.modules, "kernels", hub)
    if name in HUB_KERNELS[1:]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
        with pytest.raises(ValueError, match=r"is built for compute capabilities 8 and 9, and this device has 10\.0"):
            prepare_attention(name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for get_kernel, says in (
        (offline, r'is not loaded by the package kernels \(no network\): use "sdpa"$'),
        (
            forward_only,
            r"has no (_flash_attn_varlen_forward, )?_flash_attn_.*backward in its flash_attn_interface: use",
        ),
        (something_else, "has no _flash_attn_forward, _flash_attn_"),
    ):
        monkeypatch.setattr(hub, "get_kernel", get_kernel, raising=False)
        with pytest.raises(ValueError, match=f'attention "{name}" {says}'):
            prepare_attention(name)

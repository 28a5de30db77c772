"""What is known of a device: its data sheet by its name, and the memory that it has needed."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from processes import ROOT

from mst_ds.metrics import peak_flops


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA H20", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA A10G", 70.0),
        ("Tesla T4", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_by_device_name(monkeypatch: pytest.MonkeyPatch, name: str, teraflops: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = None if teraflops is None else pytest.approx(teraflops * 1e12)
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == expected
    assert peak_flops(torch.device("cuda", 0), torch.float32) is None


def test_the_peak_of_a_cpu_is_unknown() -> None:
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_cpu_memory_counts_what_the_process_holds() -> None:
    """In a process of its own: it is the most that there ever was, and this one may have had more before."""
    script = """
import torch
from mst_ds.metrics import peak_memory_bytes
before = peak_memory_bytes(torch.device("cpu"))
held = torch.ones(512 * 2**20, dtype=torch.uint8)
assert peak_memory_bytes(torch.device("cpu")) - before >= 0.9 * held.nbytes
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, timeout=120)

"""Probes of what the device and its libraries do, below any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.gpu.attention_kernels import probe_kernels, probe_new_lengths
from benchmarks.gpu.products import probe_products
from benchmarks.gpu.sections import Context
from benchmarks.gpu.timing import seconds_of
from benchmarks.measure import outside_bytes

KEYS = ("products", "kernels", "new_lengths", "copies", "outside_bytes")


def run(context: Context, results: dict[str, Any]) -> None:
    """Products, attention kernels, new lengths, copies, and what libraries have taken of the memory after all these."""
    results["products"] = probe_products(context)
    results["kernels"] = probe_kernels(context)
    results["new_lengths"] = probe_new_lengths(context)
    results["copies"] = _probe_copies(context)
    results["outside_bytes"] = outside_bytes(context.device) if context.device.type == "cuda" else None


def _probe_copies(context: Context) -> dict[str, float] | str:
    """Bytes/s between pinned memory of the host and the device."""
    if context.device.type != "cuda":
        return "no accelerator"
    on_host = torch.empty(context.scale.copy_bytes, dtype=torch.uint8, pin_memory=True)
    on_device = torch.empty_like(on_host, device=context.device)
    copies = {
        "to_device": lambda: on_device.copy_(on_host, non_blocking=True),
        "to_host": lambda: on_host.copy_(on_device, non_blocking=True),
    }
    return {name: context.scale.copy_bytes / seconds_of(copy, context.device) for name, copy in copies.items()}


def lines(results: Mapping[str, Any]) -> list[str]:
    """Of each form and kernel the rate."""
    shown = []
    for form in dict.fromkeys(record["form"] for record in results.get("products", ())):
        rates = [
            f"{record['tflops']:.3g}" if "tflops" in record else "-"
            for record in results["products"]
            if record["form"] == form
        ]
        shown.append(f"{form}: {' / '.join(rates)} TFLOP/s")
    for record in results.get("kernels", ()):
        if "error" not in record:
            both = f"{record['forward_tflops']:.3g} + {record['backward_tflops']:.3g} TFLOP/s"
            shown.append(f"{record['kernel']}, head size {record['head_dim']}: {both}")
    return shown

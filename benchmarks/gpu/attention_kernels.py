"""Probes of attention kernels: which torch takes, how fast each is, what it needs, and what a new length costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.flops import count_flops
from benchmarks.gpu.sections import Context, attempt
from benchmarks.gpu.timing import host_and_device_seconds, seconds_of

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]

_BACKENDS: Mapping[str, SDPBackend | None] = {
    "as torch takes it": None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_PACKAGE = "flash-attn"
_BACKWARD_FLOPS = 2.5  # of the forward's: kernels compute the scores again
_REPEATS = 3


def _attention(name: str) -> Attend:
    """Causal attention by one kernel; query (B, n, S, D), key and value (B, k, S, D)."""
    if name == _PACKAGE:
        from flash_attn import flash_attn_func

        return lambda *x: flash_attn_func(*(t.transpose(1, 2) for t in x), causal=True).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        backend = _BACKENDS[name]
        groups = query.shape[1] // key.shape[1]
        if backend is SDPBackend.EFFICIENT_ATTENTION:  # it knows no groups of heads
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        with nullcontext() if backend is None else sdpa_kernel(backend):
            return scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
            )

    return attend


def _inputs(context: Context, head_dim: int, length: int) -> list[Tensor]:
    scale = context.scale
    with context.device:
        torch.manual_seed(0)
        heads = scale.heads, scale.key_heads, scale.key_heads
        return [torch.randn(1, n, length, head_dim, dtype=torch.bfloat16).requires_grad_() for n in heads]


def probe_kernels(context: Context) -> list[dict[str, Any]]:
    """Of each kernel and head size, at one long document: operators, TFLOP/s forward and backward, and the bytes that
    each needs beside inputs, output and gradients."""
    length = context.scale.kernel_length
    found = []
    for head_dim in context.scale.head_dims:
        inputs = _inputs(context, head_dim, length)
        for name in (*_BACKENDS, _PACKAGE):
            record = attempt(functools.partial(_measure, context, name, inputs))
            found.append({"kernel": name, "head_dim": head_dim, "length": length, **record})
    return found


def _measure(context: Context, name: str, inputs: list[Tensor]) -> dict[str, Any]:
    attend, device, query = _attention(name), context.device, inputs[0]
    forward_flops = 2 * 2 * query.shape[1] * query.shape[2] ** 2 * query.shape[3] / 2
    counts = count_flops(lambda: _backward(attend, inputs))
    with _workspace(device) as forward_bytes:
        output = attend(*inputs)
        forward_bytes["kept"] = output.numel() * output.itemsize
    gradient = torch.ones_like(output)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, inputs, gradient, retain_graph=True)

    with _workspace(device) as backward_bytes:
        backward_bytes["kept"] = sum(grad.numel() * grad.itemsize for grad in backward())
    forward_seconds = seconds_of(lambda: attend(*inputs), device, _REPEATS)
    backward_seconds = seconds_of(backward, device, _REPEATS)
    return {
        "operators": counts.attention_kernels,
        "forward_seconds": forward_seconds,
        "backward_seconds": backward_seconds,
        "forward_tflops": forward_flops / forward_seconds / 1e12,
        "backward_tflops": _BACKWARD_FLOPS * forward_flops / backward_seconds / 1e12,
        "forward_workspace_bytes": forward_bytes["workspace"],
        "backward_workspace_bytes": backward_bytes["workspace"],
    }


@contextmanager
def _workspace(device: torch.device) -> Iterator[dict[str, int | None]]:
    """Puts into "workspace" what was needed at most, less what was there before and "kept"; None on a CPU."""
    found: dict[str, Any] = {"workspace": None}
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    yield found
    if device.type == "cuda":
        found["workspace"] = torch.cuda.max_memory_allocated(device) - before - found["kept"]


def probe_new_lengths(context: Context) -> list[dict[str, Any]]:
    """How long the host is busy with forward and backward at lengths that are new to a kernel, and at the same lengths
    again: seconds, the sum of all of them."""
    head_dim, found = context.scale.head_dims[-1], []
    for name in _BACKENDS:

        def measure(name: str = name) -> dict[str, Any]:
            attend = _attention(name)
            _backward(attend, _inputs(context, head_dim, context.scale.kernel_length // 4))  # what is loaded once
            sums = {"new_seconds": 0.0, "known_seconds": 0.0}
            for length in context.scale.new_lengths:
                inputs = _inputs(context, head_dim, length)
                for key in sums:
                    host, _ = host_and_device_seconds(functools.partial(_backward, attend, inputs), context.device)
                    sums[key] += host
            return {"lengths": list(context.scale.new_lengths), **sums}

        found.append({"kernel": name, **attempt(measure)})
    return found


def _backward(attend: Attend, inputs: list[Tensor]) -> None:
    output = attend(*inputs)
    torch.autograd.grad(output, inputs, torch.ones_like(output))

"""Experts as transformers computes them, ours on the same tensors, and the tensors."""

import torch
import torch.nn.functional as F

from mst_ds.minisequence import chunked_experts

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 2, 64, 96


def swiglu(inner):
    gate, up = inner.chunk(2, dim=-1)
    return F.silu(gate) * up


def clamped_swiglu(inner):
    """As GPT-OSS gates: gate and up interleaved, clamped."""
    gate, up = inner[..., ::2].clamp(max=1.0), inner[..., 1::2].clamp(min=-1.0, max=1.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def make_index(count, experts=EXPERTS, top_k=TOP_K):
    """Experts of very different popularity, among them one that is never chosen."""
    torch.manual_seed(1)
    popularity = torch.linspace(0, 3, experts)
    popularity[experts // 2] = -100
    return (popularity + torch.randn(count, experts)).topk(top_k, dim=-1).indices


def make_tensors(dtype, count, *, bias=True, transposed=False, gated=True, hidden=HIDDEN, intermediate=INTERMEDIATE):
    torch.manual_seed(0)
    outputs = intermediate * (2 if gated else 1)
    tensors = {
        "x": torch.randn(count, hidden),
        "scores": torch.rand(count, TOP_K),
        "up": torch.randn(EXPERTS, outputs, hidden) * hidden**-0.5,
        "down": torch.randn(EXPERTS, hidden, intermediate) * intermediate**-0.5,
    }
    if transposed:
        tensors |= {name: tensors[name].transpose(1, 2).contiguous() for name in ("up", "down")}
    if bias:
        tensors |= {"up_bias": torch.randn(EXPERTS, outputs), "down_bias": torch.randn(EXPERTS, hidden)}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def plain_experts(index, tensors, *, gate=swiglu, transposed=False):
    """As transformers computes them: expert by expert, each over all its tokens."""
    x, out = tensors["x"], torch.zeros_like(tensors["x"])
    for expert in range(EXPERTS):
        rows, places = torch.where(index == expert)
        up, down = (tensors[name][expert].t() if transposed else tensors[name][expert] for name in ("up", "down"))
        up_bias, down_bias = (tensors[name][expert] if name in tensors else None for name in ("up_bias", "down_bias"))
        result = F.linear(gate(F.linear(x[rows], up, up_bias)), down, down_bias)
        out.index_add_(0, rows, (result * tensors["scores"][rows, places, None]).to(out.dtype))
    return out


def our_experts(chunks, index, tensors, *, gate=swiglu, transposed=False, **settings):
    return chunked_experts(
        tensors["x"],
        index,
        tensors["scores"],
        tensors["up"],
        tensors["down"],
        chunks=chunks,
        gate=gate,
        up_bias=tensors.get("up_bias"),
        down_bias=tensors.get("down_bias"),
        transposed=transposed,
        **settings,
    )


VARIANTS = {
    "swiglu": ({"bias": False}, {}),
    "transposed-bias-clamped": ({"transposed": True}, {"gate": clamped_swiglu, "transposed": True}),
    "no-gate": ({"gated": False}, {"gate": F.gelu}),
}

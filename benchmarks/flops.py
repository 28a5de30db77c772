"""Counts the matrix and attention FLOPs of whatever runs, and how often attention runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Where the two factors of a product stand among an operator's arguments; `.out`, `.dtype` and in-place variants alike.
_PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::baddbmm": 1,
    "aten::baddbmm_": 1,
}
# torch's fused kernels and the package flash-attn; what torch takes apart into products is counted as these.
_KERNEL = re.compile(r"_(flash|efficient|cudnn)_(attention|attn)")
_CAUSAL_MASK = 1  # a `custom_mask_type` of torch's memory-efficient kernel


@dataclass
class Counts:
    """FLOPs, two for each multiplication with its addition; calls of attention kernels, and which these were."""

    matrix: int = 0
    attention: int = 0
    attention_forwards: int = 0
    attention_backwards: int = 0
    attention_kernels: list[str] = field(default_factory=list)


class CountFlops(TorchDispatchMode):
    """Counts while it is on, in `counts`; `torch.utils.flop_counter` fails in custom functions and skips `addmm_`.

    Attention is counted as its kernels run it: half of the scores where it is causal, and in the backward five products
    in place of two, since kernels compute the scores again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name in _PRODUCTS:
            first = _PRODUCTS[name]
            self.counts.matrix += _product_flops(args[first], args[first + 1])
        elif _KERNEL.search(name):
            self._count_attention(name, _named_arguments(func, args, kwargs))
        return func(*args, **kwargs)

    def _count_attention(self, name: str, arguments: dict[str, Any]) -> None:
        flops = attention_forward_flops(name, arguments)
        if name not in self.counts.attention_kernels:
            self.counts.attention_kernels.append(name)
        if "backward" in name:
            self.counts.attention_backwards += 1
            self.counts.attention += flops * 5 // 2
        else:
            self.counts.attention_forwards += 1
            self.counts.attention += flops


def _named_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = (argument.name for argument in func._schema.arguments)
    defaults = {argument.name: argument.default_value for argument in func._schema.arguments}
    return defaults | dict(zip(names, args, strict=False)) | kwargs


def _product_flops(a: Tensor, b: Tensor) -> int:
    """a (…, m, k) times b (…, k, n)."""
    return 2 * a.numel() * b.shape[-1]


def attention_forward_flops(name: str, arguments: dict[str, Any]) -> int:
    """Of the kernel `name`, whose arguments have their names: half of the products where it is causal."""
    query, key, value = (_first(arguments, (long, long[0])) for long in ("query", "key", "value"))
    if query.dim() == 3:  # documents one after another, (T, n, D), each from a number in `cum_seq` to the next
        borders = _first(arguments, ("cum_seq_q", "cu_seqlens_q", "cu_seq_q"))
        pairs = int(borders.diff().square().sum())
        flops = 2 * query.shape[1] * pairs * (query.shape[2] + value.shape[2])
        return flops // 2 if _first(arguments, ("is_causal", "causal")) else flops
    # `_scaled_dot_product_*` have (B, n, S, D); the operators below them, and the package flash-attn, (B, S, n, D).
    heads, length = (1, 2) if "_scaled_dot_product" in name else (2, 1)
    pairs = query.shape[length] * key.shape[length]
    causal = arguments.get("custom_mask_type") == _CAUSAL_MASK or _first(arguments, ("is_causal", "causal"))
    flops = 2 * query.shape[0] * query.shape[heads] * pairs * (query.shape[3] + value.shape[3])
    return flops // 2 if causal else flops


def _first(arguments: dict[str, Any], names: tuple[str, ...]) -> Any:
    return next((arguments[name] for name in names if name in arguments), None)


def count_flops(run: Callable[[], object]) -> Counts:
    """What one call of `run` computes."""
    with torch.enable_grad(), CountFlops() as flops:
        run()
    return flops.counts

"""SwiGLU's product, forward and backward, in one kernel each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import operator

_ELEMENTS = 1024  # of a program


@operator("silu_product(Tensor gate, Tensor up, Tensor(a!) out) -> ()")
def product(gate: Tensor, up: Tensor, out: Tensor) -> None:
    """Write `silu(gate) * up` (arXiv 2002.05202, equation 6), computed in fp32 and rounded once.

    Args:
        gate, up, out: of one shape, contiguous; `out` may be one of the others.
    """
    count = gate.numel()
    product_kernel[(triton.cdiv(count, _ELEMENTS),)](gate, up, out, count, ELEMENTS=_ELEMENTS)


@operator("silu_product_backward(Tensor gate, Tensor up, Tensor d_product, Tensor(a!) d_gate, Tensor(b!) d_up) -> ()")
def backward(gate: Tensor, up: Tensor, d_product: Tensor, d_gate: Tensor, d_up: Tensor) -> None:
    """Write the gradients of both factors, each rounded once.

    Args:
        gate, up, d_product, d_gate, d_up: of one shape, contiguous; the last two may be any of the others.
    """
    count = gate.numel()
    backward_kernel[(triton.cdiv(count, _ELEMENTS),)](gate, up, d_product, d_gate, d_up, count, ELEMENTS=_ELEMENTS)


@triton.jit
def product_kernel(gate, up, out, count, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    is_inside = at < count
    wide = tl.load(gate + at, mask=is_inside, other=0.0).to(tl.float32)
    factor = tl.load(up + at, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(out + at, (wide * tl.sigmoid(wide) * factor).to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def backward_kernel(gate, up, d_product, d_gate, d_up, count, ELEMENTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    is_inside = at < count
    wide = tl.load(gate + at, mask=is_inside, other=0.0).to(tl.float32)
    factor = tl.load(up + at, mask=is_inside, other=0.0).to(tl.float32)
    grad = tl.load(d_product + at, mask=is_inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(wide)
    slope = sigmoid * (1 + wide * (1 - sigmoid))
    tl.store(d_gate + at, (grad * factor * slope).to(d_gate.dtype.element_ty), mask=is_inside)
    tl.store(d_up + at, (grad * wide * sigmoid).to(d_up.dtype.element_ty), mask=is_inside)

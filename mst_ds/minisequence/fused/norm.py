"""RMSNorm, forward and backward, in one kernel each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import operator

# Elements of a tile, unless a row has more.
_TILE = 4096
# Tiles of one program of the backward. Their part of the weight's gradient is summed one after the other.
_TILES = 16
# Parts of the weight's gradient that lie in memory at once, together with `_TILES`: 64 MiB.
ELEMENTS_AT_ONCE = 2**28


def _tile(width: int) -> tuple[int, int, int]:
    """Rows, columns and warps."""
    columns = triton.next_power_of_2(width)
    rows = max(1, _TILE // columns)
    return rows, columns, min(32, max(4, rows * columns // 512))


def num_parts(tokens: int, width: int) -> int:
    """Into how many parts, each a row, `backward` sums the weight's gradient."""
    return triton.cdiv(tokens, _tile(width)[0] * _TILES)


@operator("rms_norm(Tensor x, Tensor weight, Tensor(a!) out, float epsilon, float offset) -> ()")
def forward(x: Tensor, weight: Tensor, out: Tensor, epsilon: float, offset: float) -> None:
    """Write `x / sqrt(mean(x^2) + epsilon) * (weight + offset)`, computed in fp32 and rounded once.

    Args:
        x: (T, H), whose rows are contiguous.
        weight, out: (H,) and (T, H), contiguous.
    """
    tokens, width = x.shape
    rows, columns, warps = _tile(width)
    forward_kernel[(triton.cdiv(tokens, rows),)](
        *(x, weight, out, tokens, width, x.stride(0), epsilon, offset), ROWS=rows, COLUMNS=columns, num_warps=warps
    )


@operator(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor dy, Tensor(a!)? dx, Tensor(b!)? parts, float epsilon, "
    "float offset) -> ()"
)
def backward(
    x: Tensor, weight: Tensor, dy: Tensor, dx: Tensor | None, parts: Tensor | None, epsilon: float, offset: float
) -> None:
    """Write the input's gradient, and sums of the weight's over some tokens each; what is None is not wanted.

    Args:
        x, dy: (T, H), whose rows are contiguous.
        weight, dx: (H,) and (T, H), contiguous.
        parts: (num_parts(T, H), H) in fp32.
    """
    tokens, width = x.shape
    rows, columns, warps = _tile(width)
    backward_kernel[(num_parts(tokens, width),)](
        *(x, weight, dy, dx if dx is not None else x, parts if parts is not None else x),
        *(tokens, width, x.stride(0), dy.stride(0), epsilon, offset),
        NEEDS_X=dx is not None,
        NEEDS_WEIGHT=parts is not None,
        TILES=_TILES,
        ROWS=rows,
        COLUMNS=columns,
        num_warps=warps,
    )


@triton.jit
def _load(tensor, rows, tokens, columns, width, stride):
    """A tile in fp32."""
    is_inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    return tl.load(tensor + rows[:, None] * stride + columns[None, :], mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, tile, rows, tokens, columns, width):
    is_inside = (rows < tokens)[:, None] & (columns < width)[None, :]
    at = tensor + rows[:, None] * width + columns[None, :]
    tl.store(at, tile.to(tensor.dtype.element_ty), mask=is_inside)


@triton.jit
def forward_kernel(
    x,
    weight,
    out,
    tokens,
    width,
    x_stride,
    epsilon,
    offset,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    scale = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32) + offset
    wide = _load(x, rows, tokens, columns, width, x_stride)
    factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + epsilon)
    _store(out, wide * factor[:, None] * scale[None, :], rows, tokens, columns, width)


@triton.jit
def backward_kernel(
    x,
    weight,
    dy,
    dx,
    parts,
    tokens,
    width,
    x_stride,
    dy_stride,
    epsilon,
    offset,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    scale = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32) + offset
    total = tl.zeros([COLUMNS], tl.float32)
    for tile in range(TILES):
        rows = (part * TILES + tile) * ROWS + tl.arange(0, ROWS)
        wide = _load(x, rows, tokens, columns, width, x_stride)
        grad = _load(dy, rows, tokens, columns, width, dy_stride)
        factor = tl.rsqrt(tl.sum(wide * wide, axis=1) / width + epsilon)[:, None]
        normalised = wide * factor
        products = grad * normalised
        if NEEDS_WEIGHT:
            total += tl.sum(products, axis=0)
        if NEEDS_X:
            # As in the operator's plain backward: what is along x itself is lost.
            along = (tl.sum(products * scale[None, :], axis=1) / width)[:, None]
            _store(dx, (grad * scale[None, :] - normalised * along) * factor, rows, tokens, columns, width)
    if NEEDS_WEIGHT:
        tl.store(parts + part * width + columns, total, mask=columns < width)

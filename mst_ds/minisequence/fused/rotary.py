"""The rotary embedding, forward and backward, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import operator

# Elements of a tile, half of one head's over some tokens; the angles of these tokens are read once for all heads.
_TILE = 1024


@operator("rotary(Tensor x, Tensor cos, Tensor sin, Tensor(a!) out, bool is_backward) -> ()")
def rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, is_backward: bool) -> None:
    """Write the first R dimensions of `x * cos + rotate_half(x) * sin`, or, backward, of the gradient of its `x` where
    `x` is that of its value; computed in fp32 and rounded once.

    Args:
        x, out: (B, N, L, D), in whose last dimension elements are neighbours.
        cos, sin: (B, L, R) or (1, L, R), contiguous, R even and at most D.
    """
    batch, heads, length, _ = x.shape
    half = cos.shape[-1] // 2
    columns = triton.next_power_of_2(half)
    rows = max(1, _TILE // columns)
    rotate_kernel[(triton.cdiv(length, rows), batch)](
        *(x, cos, sin, out),
        *(heads, length, half),
        0 if len(cos) == 1 else cos.stride(0),
        *x.stride()[:3],
        *out.stride()[:3],
        IS_BACKWARD=is_backward,
        ROWS=rows,
        COLUMNS=columns,
    )


@triton.jit
def rotate_kernel(
    x,
    cos,
    sin,
    out,
    heads,
    length,
    half,
    angle_stride,
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    IS_BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    sequence = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)[None, :]
    is_inside = (tokens < length)[:, None] & (columns < half)
    angles = sequence * angle_stride + tokens[:, None] * (2 * half) + columns
    first_cos = tl.load(cos + angles, mask=is_inside, other=0.0).to(tl.float32)
    second_cos = tl.load(cos + angles + half, mask=is_inside, other=0.0).to(tl.float32)
    first_sin = tl.load(sin + angles, mask=is_inside, other=0.0).to(tl.float32)
    second_sin = tl.load(sin + angles + half, mask=is_inside, other=0.0).to(tl.float32)
    if IS_BACKWARD:
        first_sin, second_sin = -second_sin, -first_sin
    x_at = x + sequence * x_batch_stride + tokens[:, None] * x_token_stride + columns
    out_at = out + sequence * out_batch_stride + tokens[:, None] * out_token_stride + columns
    for _ in range(heads):
        first = tl.load(x_at, mask=is_inside, other=0.0).to(tl.float32)
        second = tl.load(x_at + half, mask=is_inside, other=0.0).to(tl.float32)
        turned = first * first_cos - second * first_sin
        tl.store(out_at, turned.to(out.dtype.element_ty), mask=is_inside)
        turned = second * second_cos + first * second_sin
        tl.store(out_at + half, turned.to(out.dtype.element_ty), mask=is_inside)
        x_at += x_head_stride
        out_at += out_head_stride

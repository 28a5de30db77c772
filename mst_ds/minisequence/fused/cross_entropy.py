"""Cross-entropy and its gradient in one kernel, which reads and writes logits in 16 bits."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import operator

COLUMNS_OF_TILE = 8192  # of a tile, unless there are fewer logits


@operator(
    "cross_entropy_(Tensor(a!) logits, Tensor labels, Tensor factor, Tensor(b!) losses, int ignore_index, "
    "float scale, bool needs_gradients) -> ()"
)
def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    factor: Tensor,
    losses: Tensor,
    ignore_index: int,
    scale: float,
    needs_gradients: bool,
) -> None:
    """Write each row's cross-entropy, 0 where ignored, and over the logits `factor` times their gradient, if needed.

    Args:
        logits: (T, V), contiguous; before their scale.
        labels: (T,), integers.
        factor: a scalar in fp32, or (T,), contiguous.
        losses: (T,) in fp32.
        scale: what the softmax is of is the logits times this.
    """
    tokens, vocab = logits.shape
    columns = min(COLUMNS_OF_TILE, triton.next_power_of_2(vocab))
    cross_entropy_kernel[(tokens,)](
        *(logits, labels, factor, losses, vocab, factor.dim(), ignore_index, scale),
        NEEDS_GRADIENTS=needs_gradients,
        COLUMNS=columns,
        num_warps=min(16, max(4, columns // 512)),
    )


@triton.jit
def cross_entropy_kernel(
    logits,
    labels,
    factor,
    losses,
    vocab,
    factor_stride,
    ignore_index,
    scale,
    NEEDS_GRADIENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_logits = logits + row * vocab
    label = tl.load(labels + row)
    is_valid = label != ignore_index
    # Before the sums, which all threads wait for: afterwards another may have written its gradient there. A label
    # outside of the vocabulary makes the loss and all gradients NaN, so that nobody trains on them.
    is_label = is_valid & (label >= 0) & (label < vocab)
    of_label = tl.load(row_logits + label, mask=is_label, other=float("nan")).to(tl.float32) * scale
    # Below all logits but -inf, which may be all that the first tile has.
    greatest = tl.full((), -3.0e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        part = tl.load(row_logits + columns, mask=columns < vocab, other=-float("inf")).to(tl.float32) * scale
        greatest_now = tl.maximum(greatest, tl.max(part, axis=0))
        total = total * tl.exp(greatest - greatest_now) + tl.sum(tl.exp(part - greatest_now), axis=0)
        greatest = greatest_now
    loss = tl.log(total) - (of_label - greatest)
    tl.store(losses + row, tl.where(is_valid, loss, 0.0))
    if NEEDS_GRADIENTS:
        weight = tl.where(is_valid, tl.load(factor + row * factor_stride) * scale, 0.0)
        weight = tl.where(is_valid == is_label, weight, float("nan"))
        for start in range(0, vocab, COLUMNS):
            columns = start + tl.arange(0, COLUMNS)
            is_inside = columns < vocab
            part = tl.load(row_logits + columns, mask=is_inside, other=-float("inf")).to(tl.float32) * scale
            grad = weight * (tl.exp(part - greatest) / total - (columns == label).to(tl.float32))
            tl.store(row_logits + columns, grad.to(logits.dtype.element_ty), mask=is_inside)

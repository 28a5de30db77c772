"""A chunk of tokens through an LM head, to the log-probabilities of its labels, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mst_ds.dtypes import sum_dtype
from mst_ds.geometry import chunk_slices

from . import fused
from .chunks import GradientSum, Linear, Scratch, slices_in_cache
from .linear_sums import SumLinearGradients, differentiate

Head = Callable[[Tensor], Tensor]


class HeadCall(NamedTuple):
    """What an operator over an LM head does with each chunk of its tokens.

    labels: integers, (...); chunks: how many; head: None where the parameters are a weight and a bias.
    """

    labels: Tensor
    chunks: int
    ignore_index: int
    transform: LogitTransform
    head: Head | None = None

    def flat_labels(self, hidden_states: Tensor) -> Tensor:
        """(tokens,), on the device of `hidden_states`, (..., H).

        Raises:
            ValueError: labels of another shape.
        """
        leading = hidden_states.shape[:-1]
        if self.labels.shape != leading:
            raise ValueError(
                f"labels must have the shape {tuple(leading)}, that of hidden_states without its last dimension, got "
                f"{tuple(self.labels.shape)}"
            )
        return self.labels.to(hidden_states.device).reshape(-1).contiguous()

    def run(
        self, x: Tensor, labels: Tensor, factor: Tensor | None, dx: Tensor | None, sums: Sequence[GradientSum]
    ) -> Tensor:
        """The cross-entropy of each token, (tokens,), 0 where ignored, in fp32 at least; chunk by chunk.

        Args:
            x: (tokens, H).
            factor: what the gradient of a token's cross-entropy is multiplied by: a scalar, or (tokens,). None where no
                gradients are needed.
            dx: (tokens, H), to which the gradient of `x` is written; None where it is not needed.
            sums: of the parameters' gradients, which are added to.
        """
        losses = torch.zeros(x.shape[0], dtype=sum_dtype(x.dtype), device=x.device)
        scratch = Scratch()
        for rows in chunk_slices(x.shape[0], self.chunks):
            head = self._begin(x[rows], dx[rows] if dx is not None else None, sums, scratch)
            of_chunk = factor if factor is None or factor.dim() == 0 else factor[rows]
            d_logits = self._cross_entropy(head, labels[rows], of_chunk, losses[rows])
            if factor is not None:
                head.add_gradients(d_logits)
            # Before the next chunk's: two chunks' logits must never be alive together.
            del head, d_logits
        return losses

    def _begin(
        self, x: Tensor, dx: Tensor | None, sums: Sequence[GradientSum], scratch: Scratch
    ) -> _LinearHead | _CallableHead:
        if self.head is not None:
            return _CallableHead(self.head, x, dx, sums, scratch)
        weight, bias = sums
        return _LinearHead(x, dx, weight, bias, scratch)

    def _cross_entropy(
        self, head: _LinearHead | _CallableHead, labels: Tensor, factor: Tensor | None, losses: Tensor
    ) -> Tensor:
        """Write the losses of a chunk; return `factor` times the gradient of the head's output, if there is one, in the
        memory of its logits."""
        transform = self.transform
        if transform.softcap is None and fused.runs(head.output):
            from .fused.cross_entropy import cross_entropy_

            logits = head.logits(head.output.dtype)
            needs_gradients = factor is not None
            factor = losses.new_ones(()) if factor is None else factor
            cross_entropy_(logits, labels, factor, losses, self.ignore_index, transform.slope, needs_gradients)
            return logits
        logits, slope = transform(head.logits(sum_dtype(head.output.dtype)), keep_slope=factor is not None)
        losses.copy_(_cross_entropy_(logits, labels, self.ignore_index, factor))
        return logits if slope is None or factor is None else logits.mul_(slope)


class _LinearHead:
    """One chunk through a linear head: its logits, then the gradients that belong to theirs."""

    def __init__(self, x: Tensor, dx: Tensor | None, weight: GradientSum, bias: GradientSum, scratch: Scratch) -> None:
        self.x, self.dx, self.d_weight, self.d_bias, self.scratch = x, dx, weight, bias, scratch
        assert weight.parameter is not None
        self.layer = Linear(weight.parameter, bias.parameter)
        self.output = scratch.empty("output", (len(x), len(weight.parameter)), x.dtype, x.device)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """(T, V), the caller's to write over."""
        output = self.layer.write(self.x, self.output)
        if dtype == output.dtype:
            return output
        return self.scratch.empty("logits", output.shape, dtype, output.device).copy_(output)

    def add_gradients(self, d_logits: Tensor) -> None:
        """Add the parameters' gradients to their sums, write the input's."""
        x = self.x
        rounded = d_logits if d_logits.dtype == x.dtype else self.output.copy_(d_logits)
        # A CUDA GEMM reads 16-bit operands; where it has to be fp32 anyway, the rounding is saved.
        self.d_weight.add_outer_products(rounded if x.is_cuda else d_logits, x)
        self.d_bias.add_column_sums(d_logits)
        if self.dx is not None:
            torch.mm(rounded, self.layer.weight, out=self.dx)


class _CallableHead:
    """One chunk through any head, by autograd."""

    def __init__(self, head: Head, x: Tensor, dx: Tensor | None, sums: Sequence[GradientSum], scratch: Scratch) -> None:
        self.dx, self.sums, self.scratch = dx, sums, scratch
        self.x = x.detach().unsqueeze(0).requires_grad_(dx is not None)
        has_gradient = dx is not None or any(gradient.is_needed for gradient in sums)
        with torch.set_grad_enabled(has_gradient), SumLinearGradients(sums):
            self.output = head(self.x)

    def logits(self, dtype: torch.dtype) -> Tensor:
        """(T, V), the caller's to write over."""
        output = self.output.detach().squeeze(0)
        # A copy in any case: a head may return what autograd needs again, or its own parameter.
        return self.scratch.empty("logits", output.shape, dtype, output.device).copy_(output)

    def add_gradients(self, d_logits: Tensor) -> None:
        """Add the parameters' gradients to their sums, write the input's."""
        d_output = d_logits.to(self.output.dtype).unsqueeze(0)
        differentiate(self.output, d_output, [self.x], [self.dx], self.sums)


class LogitTransform(NamedTuple):
    """What becomes of a head's output: `softcap * tanh(scale * output / softcap) / temperature`, in fp32."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def slope(self) -> float:
        """The derivative by the head's output, without a softcap."""
        return self.scale / self.temperature

    def __call__(self, logits: Tensor, *, keep_slope: bool) -> tuple[Tensor, Tensor | float | None]:
        """Write over `logits`; return them and the derivative by the head's output, None where it is 1."""
        if self.softcap is None:
            if self.slope == 1:
                return logits, None
            return logits.mul_(self.slope), self.slope
        if self.scale != 1:
            logits *= self.scale
        logits /= self.softcap
        logits.tanh_()
        slope = logits.square().neg_().add_(1).mul_(self.slope) if keep_slope else None
        return logits.mul_(self.softcap / self.temperature), slope


def _cross_entropy_(logits: Tensor, labels: Tensor, ignore_index: int, factor: Tensor | None) -> Tensor:
    """Cross-entropy of each row, (T,), 0 where ignored; `logits` becomes `factor` times its own gradient, in place.

    Args:
        logits: (T, V) in fp32 or fp64; holds `factor * (softmax(logits) - one_hot(labels))` afterwards, 0 in ignored
            rows. Without a factor what it holds is of no use.
        labels: (T,).
        factor: a scalar, or (T,); None where no gradient is needed.
    """
    losses = torch.empty_like(logits[:, 0])
    # A few rows at a time, which stay in a CPU's cache from one pass over them to the next.
    for rows in slices_in_cache(logits):
        part, valid = logits[rows], labels[rows] != ignore_index
        targets = labels[rows].where(valid, 0).unsqueeze(-1)
        part -= part.amax(-1, keepdim=True)
        target_logits = part.gather(-1, targets)
        sums = part.exp_().sum(-1, keepdim=True)
        losses[rows] = (sums.log() - target_logits).squeeze(-1).where(valid, 0)
        if factor is None:
            continue
        weights = torch.where(valid, factor if factor.dim() == 0 else factor[rows], 0).unsqueeze(-1)
        part *= weights / sums
        part.scatter_add_(-1, targets, -weights)
    return losses

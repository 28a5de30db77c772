"""torch's own kernels over one block of queries and keys, with their log-sum-exp and an explicit backward.

They are operators of aten, whose public function, `scaled_dot_product_attention`, gives no log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.dtypes import sum_dtype

from .kernel import Attended, Gradients

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """Which keys of a block its queries see, and how they weigh them.

    Args:
        is_causal: query i sees the keys up to i; there are as many keys as queries.
        mask: (queries, keys), added to the scores; None where all are seen, or `is_causal` says which.
    """

    scaling: float
    dropout: float
    is_causal: bool = False
    mask: Tensor | None = None


class BlockKernel(Protocol):
    """Attention of queries (B, n, S, D) to keys and values (B, k, T, D), all of which they see but for `block`."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> Attended: ...

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, block: Block
    ) -> Gradients: ...


class CpuFlash:
    """Flash attention on the CPU; without dropout, which it does not have."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> Attended:
        output, log_sum_exp = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, block.is_causal, attn_mask=block.mask, scale=block.scaling
        )
        return Attended(output, log_sum_exp)

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, block: Block
    ) -> Gradients:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_output,
            query,
            key,
            value,
            attended.output,
            attended.log_sum_exp,
            0.0,
            block.is_causal,
            attn_mask=block.mask,
            scale=block.scaling,
        )


class Cudnn:
    """cuDNN's attention, without a mask: with one its backward gives NaN for some lengths (pytorch#196678)."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> Attended:
        assert block.mask is None
        output, log_sum_exp, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, block.dropout, block.is_causal, False, scale=block.scaling
        )
        return Attended(output, log_sum_exp.flatten(2), [(seed, offset)])

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, block: Block
    ) -> Gradients:
        draw = next(iter(attended.draws))
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad_output,
            query,
            key,
            value,
            attended.output,
            attended.log_sum_exp.unsqueeze(3),
            *draw,
            None,
            None,
            None,
            query.shape[2],
            key.shape[2],
            block.dropout,
            block.is_causal,
            scale=block.scaling,
        )


class Efficient:
    """CUDA's memory-efficient kernel, for fp32, wide heads and masks. It wants as many key/value as query heads."""

    # It reads rows of a mask, and log-sum-exps, in steps of so many.
    _MASK_STEP, _ROWS_STEP = 16, 32

    def forward(self, query: Tensor, key: Tensor, value: Tensor, block: Block) -> Attended:
        key, value = (_repeated(x, query) for x in (key, value))
        output, log_sum_exp, *draw = aten._scaled_dot_product_efficient_attention(
            query, key, value, self._bias(query, key, block), True, block.dropout, block.is_causal, scale=block.scaling
        )
        return Attended(output, log_sum_exp[..., : query.shape[2]], [tuple(draw)])

    def backward(
        self, grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, attended: Attended, block: Block
    ) -> Gradients:
        draw = next(iter(attended.draws))
        repeated = [_repeated(x, query) for x in (key, value)]
        of_query, *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad_output,
            query,
            *repeated,
            self._bias(query, key, block),
            attended.output,
            # What stands behind the last row is not read into a result, but must be a number.
            pad(attended.log_sum_exp, (0, -query.shape[2] % self._ROWS_STEP)).contiguous(),
            *draw,
            block.dropout,
            [True, True, True, False],
            block.is_causal,
            scale=block.scaling,
        )
        of_key, of_value = (_summed(grad, like) for grad, like in zip(grads, (key, value), strict=True))
        return of_query, of_key, of_value

    def _bias(self, query: Tensor, key: Tensor, block: Block) -> Tensor | None:
        if block.mask is None:
            return None
        keys = key.shape[2]
        aligned = pad(block.mask, (0, -keys % self._MASK_STEP))[:, :keys]
        return aligned.expand(*query.shape[:3], keys)


def _repeated(of_keys: Tensor, query: Tensor) -> Tensor:
    """A copy of each key/value head for each of its query heads."""
    groups = query.shape[1] // of_keys.shape[1]
    return of_keys if groups == 1 else of_keys.repeat_interleave(groups, dim=1)


def _summed(grad: Tensor, of_keys: Tensor) -> Tensor:
    """The gradient of a head from those of its copies, rounded once."""
    if grad.shape[1] == of_keys.shape[1]:
        return grad
    copies = grad.unflatten(1, (of_keys.shape[1], -1))
    return copies.sum(dim=2, dtype=sum_dtype(grad.dtype)).to(grad.dtype)

"""torch's own kernels over one block of queries and keys, with their log-sum-exp and an explicit backward.

They are operators of aten, whose public function, `scaled_dot_product_attention`, gives no log-sum-exp.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.dtypes import sum_dtype

from .kernel import Attended, Block, Gradients

aten = torch.ops.aten
# The memory-efficient kernel reads a mask in steps of so many keys: rows must be a multiple of it apart.
MASK_STEP = 16


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

    # It reads log-sum-exps in steps of so many.
    _ROWS_STEP = 32

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
        assert block.mask.stride(0) % MASK_STEP == 0
        return block.mask.expand(*query.shape[:3], key.shape[2])


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

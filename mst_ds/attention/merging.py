"""Attention put together of parts by their log-sum-exps, as flash attention does over its blocks (arXiv 2205.14135)."""

from __future__ import annotations

import torch
from torch import Tensor

from mst_ds.geometry import ELEMENTS_THAT_KEEP_BUSY

from .kernel import Attended


def merge(one: Attended, other: Attended) -> Attended:
    """The attention of the same queries to the keys of both, rounded once. `one` is written over."""
    total = one.output.to(one.log_sum_exp.dtype)
    merge_into(total, one.log_sum_exp, other)
    return Attended(total.to(one.output.dtype), one.log_sum_exp, (*one.draws, *other.draws))


def merge_into(output: Tensor, log_sum_exp: Tensor, other: Attended) -> None:
    """Write attention to the keys of both over the output and log-sum-exp, both in fp32 at least, of the same queries.

    Args:
        output: (..., queries, D), in any layout.
        log_sum_exp: (..., queries).
    """
    total = torch.logaddexp(log_sum_exp, other.log_sum_exp)
    output.mul_((log_sum_exp - total).exp_()[..., None])
    # Of another dtype as it is: a copy in fp32 would be what needs the most memory.
    output.addcmul_(other.output, (other.log_sum_exp - total).exp_()[..., None])
    log_sum_exp.copy_(total)


def merge_sinks(attended: Attended, sinks: Tensor) -> Attended:
    """Attention with a further logit in each head's softmax, (n,), whose value is 0 (GPT-OSS, arXiv 2508.10925).

    The output is written over. A kernel that gets the merged output and log-sum-exp for its backward gives the
    gradients with sinks: probabilities are `exp(score - log_sum_exp)`, and their mean gradient is that of the output.
    """
    log_sum_exp = torch.logaddexp(attended.log_sum_exp, _of_queries(sinks, attended.log_sum_exp))
    attended.output.mul_((attended.log_sum_exp - log_sum_exp).exp()[..., None])
    return Attended(attended.output, log_sum_exp, attended.draws)


def sinks_gradient(grad_output: Tensor, attended: Attended, sinks: Tensor) -> Tensor:
    """(n,), in fp32 at least, from what `merge_sinks` gave: the more a sink weighs, the smaller the output."""
    total = attended.log_sum_exp.new_zeros(sinks.shape)
    length = grad_output.shape[2]
    # Products in fp32, of so many queries at a time that they need little memory.
    size = max(1, ELEMENTS_THAT_KEEP_BUSY * length // grad_output.numel())
    for start in range(0, length, size):
        part = slice(start, start + size)
        log_sum_exp = attended.log_sum_exp[:, :, part]
        products = grad_output[:, :, part].to(total.dtype) * attended.output[:, :, part]
        weights = (_of_queries(sinks, log_sum_exp) - log_sum_exp).exp()
        total -= (products.sum(dim=3) * weights).sum(dim=(0, 2))
    return total


def _of_queries(sinks: Tensor, log_sum_exp: Tensor) -> Tensor:
    return sinks.to(log_sum_exp.dtype)[:, None]

"""Attention sinks over kernels that have none: a sink is the score of one more key that every query sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mst_ds.dtypes import sum_dtype

from .spec import AttentionSpec

# By so much heads become wider: two numbers for the sink, and what keeps the width a multiple of 8, as kernels want it.
_WIDTH = 8


def attend_with_sink_token(
    attend: Callable[[Tensor, Tensor, Tensor, AttentionSpec], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
) -> Tensor:
    """Attention with sinks, without softcap, by attention that has none over a sequence with one token more.

    The token stands at the front and its value is 0. In two more dimensions its key is 1, the other keys are 0, and
    each query has its head's `sink / scaling`, in two numbers so that 16 bits do not round it: their score is the sink.

    Args:
        attend: attention that knows `AttentionSpec.front`.
        query: (B, n, S, D); key, value: (B, k, S, D) with k dividing n.

    Returns:
        (B, n, S, D).
    """
    assert spec.sinks is not None
    batch, _, length, head_dim = query.shape
    sinks = spec.sinks.to(sum_dtype(query.dtype)) / spec.scaling
    rounded = sinks.to(query.dtype)
    of_query = torch.stack([rounded, (sinks - rounded).to(query.dtype)], dim=1)
    query = torch.cat([query, of_query[None, :, None].expand(batch, -1, length, -1)], dim=3)
    sink_key = key.new_zeros(head_dim + _WIDTH)
    sink_key[head_dim : head_dim + 2] = 1
    key = torch.cat([sink_key.expand(*key.shape[:2], 1, -1), pad(key, (0, _WIDTH))], dim=2)
    query, value = pad(query, (0, _WIDTH - 2, 1, 0)), pad(value, (0, _WIDTH, 1, 0))
    return attend(query, key, value, replace(spec, sinks=None, front=1))[:, :, 1:, :head_dim]

"""Biases that grow with a key's position (ALiBi, arXiv 2108.12409), as further elements of queries and keys.

scaling * query . key + slope * position is one product of heads that are a little wider, which every kernel computes,
on shards and in chunks too. Softmax does not feel where a document's positions begin.
"""

from __future__ import annotations

import torch
from torch import Tensor

# In 16 bits a number of this many values, and one of the powers that it is multiplied by, are exact.
_BASE = 256
_DIGITS = 3
# Three parts of 8 bits make the 24 of fp32.
_PARTS = 3


def is_linear(bias: Tensor) -> bool:
    """Whether (B, N, T) of the keys' biases are the same in all rows, and those of a head rise by the same from each
    key to the next, but for how they are rounded. T is 2 at least."""
    first = bias[0].double()
    places = torch.arange(bias.shape[2], dtype=first.dtype, device=first.device)
    line = first[:, :1] + slopes_of(bias)[:, None] * places
    rounding = 2 * torch.finfo(bias.dtype).eps * first.abs().amax(dim=1, keepdim=True)
    return bool((bias == bias[:1]).all()) and bool(((first - line).abs() <= rounding).all())


def slopes_of(bias: Tensor) -> Tensor:
    """(B, N, T), T at least 2, -> (N,), in fp32 at least, as exact as `bias`."""
    # Of the keys that are farthest apart: neighbours may differ by less than they are rounded by.
    ends = bias[0, :, :: bias.shape[2] - 1].to(torch.promote_types(bias.dtype, torch.float32))
    return (ends[:, 1] - ends[:, 0]) / (bias.shape[2] - 1)


def with_slopes(query: Tensor, key: Tensor, slopes: Tensor, positions: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Queries and keys whose products, times `scaling`, have the biases in them.

    Args:
        query: (B, N, L, D); key: (B, K, L, D), of one dtype.
        slopes: (N,).
        positions: (B, L) or (1, L), integers, of the keys; one more from each token of a document to the next.

    Returns:
        (B, N, L, D + E) and (B, K, L, D + E): E is 1, or 9 in 16 bits, where slopes and positions are sums of parts
        that are exact.
    """
    factors, places = _columns(slopes / scaling, positions, query.dtype)
    of_queries = factors[None, :, None].expand(*query.shape[:3], -1)
    of_keys = places[:, None].expand(*key.shape[:3], -1)
    return torch.cat([query, of_queries], dim=3), torch.cat([key, of_keys], dim=3)


def _columns(slopes: Tensor, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, E) and (B, L, E), whose products over E are slopes times positions."""
    if dtype.itemsize > 2:
        return slopes.to(dtype)[:, None], positions.to(dtype)[..., None]
    parts, rest = [], slopes
    for _ in range(_PARTS):
        parts.append(rest.to(dtype))
        rest = rest - parts[-1].to(rest.dtype)
    # The first digit takes what is too large for the others.
    digits = [
        (positions // _BASE**place if place == _DIGITS - 1 else positions // _BASE**place % _BASE).to(dtype)
        for place in range(_DIGITS)
    ]
    # Half of a digit's power on either side, so that fp16 holds it.
    halves = [int(_BASE**0.5) ** place for place in range(_DIGITS)]
    factors = [part * half for part in parts for half in halves]
    places = [digit * half for _ in parts for digit, half in zip(digits, halves, strict=True)]
    return torch.stack(factors, dim=-1), torch.stack(places, dim=-1)

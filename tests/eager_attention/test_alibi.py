"""Biases of positions as further elements of queries and keys: exact in 16 bits too, and read off a model's own."""

from __future__ import annotations

import pytest
import torch

from mst_ds.eager_attention.alibi import is_linear, slopes_of, with_slopes

HEADS = 12
SLOPES = torch.tensor([2.0 ** -(8 * (head + 1) / HEADS) for head in range(HEADS)])
SCALING = 0.125


@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6), (torch.float16, 1e-6)],
    ids=str,
)
def test_products_have_the_biases(dtype: torch.dtype, error: float) -> None:
    """Relative, of products that are summed in fp64: 16 bits alone would be off by 4e-3. Positions up to 2^20."""
    positions = torch.tensor([[0, 1, 255, 256, 4097, 65535, 65536, 131071, 2**20]])
    query, key = torch.randn(2, HEADS, 9, 8).to(dtype), torch.randn(2, 3, 9, 8).to(dtype)
    slopes = SLOPES.to(torch.promote_types(dtype, torch.float32))
    wide_query, wide_key = with_slopes(query, key, slopes, positions, SCALING)
    assert wide_query.dtype == wide_key.dtype == dtype
    assert torch.equal(wide_query[..., :8], query)
    assert torch.equal(wide_key[..., :8], key)
    added = wide_query[..., 8:].double() @ wide_key[..., 8:].double().repeat_interleave(4, dim=1).mT * SCALING
    expected = (SLOPES.double()[:, None, None] * positions[:, None, None]).expand_as(added)
    assert float(((added - expected).abs() / expected.clamp(min=1e-9)).max()) < error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [0, -2047])
def test_slopes_are_read_off_rounded_biases(dtype: torch.dtype, first: int) -> None:
    """Counted from the start, as BLOOM does, and to the end, as MPT does."""
    bias = (SLOPES.double()[:, None] * torch.arange(first, first + 2048)).to(dtype)[None].expand(3, -1, -1)
    assert is_linear(bias)
    found = slopes_of(bias)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    error = (found.double() - SLOPES.double()).abs() / SLOPES.double()
    assert float(error.max()) <= 2 * torch.finfo(dtype).eps + 1e-7
    bent = bias.clone()
    bent[:, 3, 700] += 0.5 + bent[:, 3].abs().max() * 4 * torch.finfo(dtype).eps
    assert not is_linear(bent)
    other_rows = bias.clone()
    other_rows[1] *= 2
    assert not is_linear(other_rows)

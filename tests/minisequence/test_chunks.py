"""What the chunked operators share."""

import pytest
import torch

from mst_ds.minisequence.chunks import (
    add_column_sums,
    add_outer_products,
    cast_for_autocast,
    chunk_slices,
    require_gathered,
    unrounded_product,
    zeros_for_accumulation,
)


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 4, 7, 9, 64, 507, 1021])
@pytest.mark.parametrize("chunks", [1, 2, 4, 7, 64, 5000])
def test_slices_cover_every_token_once_in_order(num_tokens, chunks):
    slices = list(chunk_slices(num_tokens, chunks))
    assert [token for rows in slices for token in range(num_tokens)[rows]] == list(range(num_tokens))
    lengths = {rows.stop - rows.start for rows in slices}
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(
    ("num_tokens", "chunks", "lengths"),
    [
        (16, 4, [4, 4, 4, 4]),
        (19, 4, [5, 5, 5, 4]),
        # Fewer where a chunk would be shorter than 4 tokens.
        (9, 4, [5, 4]),
        (11, 5000, [6, 5]),
        (3, 2, [3]),
        (0, 3, [0]),
    ],
)
def test_lengths(num_tokens, chunks, lengths):
    assert [rows.stop - rows.start for rows in chunk_slices(num_tokens, chunks)] == lengths


@pytest.mark.parametrize("chunks", [0, -1])
def test_less_than_one_chunk_is_refused(chunks):
    with pytest.raises(ValueError, match=f"chunks must be at least 1, got {chunks}"):
        next(chunk_slices(10, chunks))


@pytest.mark.parametrize(
    ("parameter", "accumulator"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_weights_accumulate_in_fp32_at_least_and_biases_in_fp64(parameter, accumulator):
    weight = zeros_for_accumulation(torch.ones(3, 4, dtype=parameter).t())
    assert (weight.dtype, weight.shape, weight.is_contiguous()) == (accumulator, (4, 3), True)
    assert not weight.any()
    assert zeros_for_accumulation(torch.ones(3, dtype=parameter)).dtype == torch.float64


def test_outer_products_are_added_without_rounding_to_16_bits():
    # 1 + 2^-20 needs more bits than bf16 has, and the exact sum is an fp32 number.
    accumulator = torch.ones(2, 3)
    left = torch.full((5, 2), 2.0**-10, dtype=torch.bfloat16)
    right = torch.full((5, 3), 2.0**-10, dtype=torch.bfloat16)
    add_outer_products(accumulator, left, right)
    assert torch.equal(accumulator, torch.full((2, 3), 1 + 5 * 2.0**-20))


def test_outer_products_into_the_view_of_a_transposed_weight():
    left, right = torch.randn(5, 2, dtype=torch.bfloat16), torch.randn(5, 3, dtype=torch.bfloat16)
    stored = torch.ones(3, 2)
    add_outer_products(stored.t(), left, right)
    # Exact products, and sums of five of them: but for the order of the sum.
    torch.testing.assert_close(stored, 1 + right.float().t() @ left.float(), rtol=1e-6, atol=1e-6)
    halves = torch.zeros(4, 3)
    add_outer_products(halves.chunk(2)[1], left, right)
    assert not halves[:2].any()
    torch.testing.assert_close(halves[2:], left.float().t() @ right.float(), rtol=1e-6, atol=1e-6)


def test_a_product_that_is_not_rounded_to_16_bits():
    left, right = torch.full((2, 3), 1.0 + 2.0**-7).bfloat16(), torch.full((3, 4), 1.0 + 2.0**-7).bfloat16()
    product = unrounded_product(left, right)
    assert product.dtype == torch.float32
    assert torch.equal(product, torch.full((2, 4), 3 * (1.0 + 2.0**-7) ** 2))
    assert unrounded_product(left.double(), right.double()).dtype == torch.float64


def test_outer_products_take_operands_of_different_dtypes():
    accumulator = torch.zeros(2, 3)
    add_outer_products(accumulator, torch.full((5, 2), 1 + 2.0**-20), torch.ones(5, 3, dtype=torch.bfloat16))
    assert torch.equal(accumulator, torch.full((2, 3), 5 + 5 * 2.0**-20))


def test_column_sums_are_added_without_rounding_to_16_bits():
    accumulator = torch.zeros(3, dtype=torch.float64)
    values = torch.ones(1001, 3, dtype=torch.bfloat16)  # bf16 cannot count beyond 256
    for _ in range(2):
        add_column_sums(accumulator, values)
    assert torch.equal(accumulator, torch.full((3,), 2002.0, dtype=torch.float64))


def test_casts_like_autocast():
    x = torch.ones(2, requires_grad=True)
    device = torch.device("cpu")
    assert cast_for_autocast(None, device) is None
    assert cast_for_autocast(x, device) is x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = cast_for_autocast(x, device)
        assert cast.dtype == torch.bfloat16
        assert cast_for_autocast(x.double(), device).dtype == torch.float64  # autocast leaves fp64 alone
    cast.sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


def test_a_placeholder_of_zero3_is_refused_by_name():
    require_gathered("up_weight", torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"up_weight has no elements: ZeRO-3 has not gathered it; call mst_ds"):
        require_gathered("up_weight", torch.empty(0))

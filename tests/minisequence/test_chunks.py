"""What the chunked operators share."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence.chunks import (
    GradientSum,
    ProductsInFp32,
    cast_for_autocast,
    chunk_slices,
    flat_view,
    gradient_sums,
    require_gathered,
    unrounded_product,
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
    weight, bias = (
        GradientSum(torch.ones(3, 4, dtype=parameter).t(), True),
        GradientSum(torch.ones(3).to(parameter), True),
    )
    assert (weight.total.dtype, weight.total.shape, weight.total.is_contiguous()) == (accumulator, (4, 3), True)
    assert not weight.total.any()
    assert bias.total.dtype == torch.float64
    assert [each.rounded().dtype for each in (weight, bias)] == [parameter] * 2


def test_what_is_written_to_is_no_copy():
    tensor = torch.zeros(2, 3, 4)
    flat_view(tensor)[5] = 1
    assert tensor[1, 2].eq(1).all()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        flat_view(tensor.transpose(0, 1))


class ProductsOfCuda(TorchFunctionMode):
    """`out_dtype`, which the CPU does not know, from fp32 copies; `called`: what it was asked of."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (dtype := kwargs.pop("out_dtype", None)) is not None:
            assert all(factor.dtype == torch.bfloat16 for factor in args[-2:])
            self.called.append(func)
            args = [arg.to(dtype) for arg in args]
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    ("has", "called"),
    [
        (ProductsInFp32(added=True, alone=True), [torch.addmm, torch.mm]),
        (ProductsInFp32(alone=True), [torch.mm, torch.mm]),  # torch 2.9
        (ProductsInFp32(), []),
    ],
    ids=["added", "alone", "neither"],
)
def test_each_form_of_a_product_gives_the_same(monkeypatch, has, called):
    monkeypatch.setattr("mst_ds.minisequence.chunks.products_in_fp32", lambda device, dtype: has)
    torch.manual_seed(0)
    left, right = torch.randn(2, 33, 8).bfloat16()
    weight = GradientSum(torch.empty(8, 8, dtype=torch.bfloat16), True)
    weight.add(torch.ones(8, 8))
    with ProductsOfCuda() as products:
        weight.add_outer_products(left, right)
        alone = unrounded_product(left.t(), right)
    assert products.called == called
    expected = left.double().t() @ right.double()
    torch.testing.assert_close(weight.total.double(), 1 + expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-6, atol=1e-5)
    # In fp32 nothing is asked of the device.
    wide = GradientSum(torch.empty(8, 8), True)
    with ProductsOfCuda() as products:
        wide.add_outer_products(left.float(), right.float())
    assert not products.called


def test_outer_products_are_added_without_rounding_to_16_bits():
    # 1 + 2^-20 needs more bits than bf16 has, and the exact sum is an fp32 number.
    weight = GradientSum(torch.empty(2, 3, dtype=torch.bfloat16), True)
    weight.add(torch.ones(2, 3))
    left = torch.full((5, 2), 2.0**-10, dtype=torch.bfloat16)
    right = torch.full((5, 3), 2.0**-10, dtype=torch.bfloat16)
    weight.add_outer_products(left, right)
    assert torch.equal(weight.total, torch.full((2, 3), 1 + 5 * 2.0**-20))
    assert torch.equal(weight.rounded(), torch.ones(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("has", "called"),
    [
        (ProductsInFp32(added=True, alone=True), [torch.mm, torch.addmm]),
        (ProductsInFp32(alone=True), [torch.mm, torch.mm]),
        (ProductsInFp32(added=True), [torch.addmm, torch.addmm]),
        (ProductsInFp32(), []),
    ],
    ids=["both", "alone", "added", "neither"],
)
def test_the_first_product_is_written_where_it_can_be(monkeypatch, has, called):
    monkeypatch.setattr("mst_ds.minisequence.chunks.products_in_fp32", lambda device, dtype: has)
    torch.manual_seed(0)
    left, right = torch.randn(33, 8).bfloat16(), torch.randn(33, 5).bfloat16()
    weight = GradientSum(torch.empty(8, 5, dtype=torch.bfloat16), True)
    with ProductsOfCuda() as products, LiveMemory() as memory:
        weight.add_outer_products(left, right)
        assert memory.live == 8 * 5 * 4
        weight.add_outer_products(left, right)
    assert products.called == called
    assert weight.total.dtype == torch.float32
    expected = 2 * left.double().t() @ right.double()
    torch.testing.assert_close(weight.total.double(), expected, rtol=1e-6, atol=1e-5)


def test_outer_products_for_a_transposed_weight():
    left, right = torch.randn(5, 2, dtype=torch.bfloat16), torch.randn(5, 3, dtype=torch.bfloat16)
    stored = GradientSum(torch.empty(3, 2, dtype=torch.bfloat16), True)
    for _ in range(2):
        stored.add_outer_products(left, right, transposed=True)
    # Exact products, and sums of ten of them: but for the order of the sum.
    torch.testing.assert_close(stored.total, 2 * right.float().t() @ left.float(), rtol=1e-6, atol=1e-6)


def test_what_needs_no_gradient_has_no_sum():
    parameter = torch.ones(3, 3)
    for none in gradient_sums((parameter, None), (False, True)):
        none.add_outer_products(parameter, parameter)
        none.add_column_sums(parameter)
        none.add(parameter)
        assert not none.is_needed
        assert none.rounded() is None


def test_a_product_that_is_not_rounded_to_16_bits():
    left, right = torch.full((2, 3), 1.0 + 2.0**-7).bfloat16(), torch.full((3, 4), 1.0 + 2.0**-7).bfloat16()
    product = unrounded_product(left, right)
    assert product.dtype == torch.float32
    assert torch.equal(product, torch.full((2, 4), 3 * (1.0 + 2.0**-7) ** 2))
    assert unrounded_product(left.double(), right.double()).dtype == torch.float64


def test_outer_products_take_operands_of_different_dtypes():
    weight = GradientSum(torch.empty(2, 3), True)
    weight.add_outer_products(torch.full((5, 2), 1 + 2.0**-20), torch.ones(5, 3, dtype=torch.bfloat16))
    assert torch.equal(weight.total, torch.full((2, 3), 5 + 5 * 2.0**-20))


def test_column_sums_are_added_without_rounding_to_16_bits():
    bias = GradientSum(torch.empty(3, dtype=torch.bfloat16), True)
    values = torch.ones(1001, 3, dtype=torch.bfloat16)  # bf16 cannot count beyond 256
    for _ in range(2):
        bias.add_column_sums(values)
    assert torch.equal(bias.total, torch.full((3,), 2002.0, dtype=torch.float64))


def test_casts_like_autocast():
    x = torch.ones(2, requires_grad=True)
    assert [id(each) for each in cast_for_autocast(x, None)] == [id(x), id(None)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, none, double = cast_for_autocast(x, None, x.double())
    assert none is None
    assert cast.dtype == torch.bfloat16
    assert double.dtype == torch.float64  # autocast leaves fp64 alone
    cast.sum().backward()
    assert torch.equal(x.grad, torch.ones(2))


def test_a_placeholder_of_zero3_is_refused_by_name():
    require_gathered("up_weight", torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"up_weight has no elements: ZeRO-3 has not gathered it; call mst_ds"):
        require_gathered("up_weight", torch.empty(0))

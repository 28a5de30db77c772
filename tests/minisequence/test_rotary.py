"""The rotary operator against the formula of transformers: bit by bit, in fp64, and in what it keeps alive."""

import pytest
import torch
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from mst_ds.memory.live import LiveMemory
from mst_ds.minisequence import chunks, rotary, rotary_embedding

BATCH, HEADS, DIM = 2, 3, 16


def plain(heads, cos, sin):
    return apply_rotary_pos_emb(heads, heads, cos, sin)[0]


def case(length, width, dtype, batch=BATCH):
    torch.manual_seed(0)
    # As models have them: a view of what a projection gave.
    heads = torch.randn(BATCH, length, HEADS, DIM).to(dtype).transpose(1, 2)
    # Independent of each other, and in both halves.
    cos, sin = torch.randn(2, batch, length, width).to(dtype)
    return heads, cos, sin, torch.randn(BATCH, HEADS, length, DIM).to(dtype)


def value_and_gradient(function, heads, cos, sin, grad_output):
    leaf = heads.detach().requires_grad_()
    output = function(leaf, cos, sin)
    return output.detach(), *torch.autograd.grad(output, leaf, grad_output.to(output.dtype))


@pytest.mark.parametrize("width", [DIM, 6], ids=["all dimensions", "some"])
@pytest.mark.parametrize("batch", [BATCH, 1], ids=["positions", "one row of positions"])
@pytest.mark.parametrize("length", [1, 507])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_rounds_as_the_plain_formula(dtype, length, batch, width, monkeypatch):
    monkeypatch.setattr(rotary, "chunks_in_cache", lambda tensor: 4)
    given = case(length, width, dtype, batch)
    found, expected = (value_and_gradient(function, *given) for function in (rotary_embedding, plain))
    assert all(map(torch.equal, found, expected))
    assert found[0].stride() == given[0].stride()


def test_angles_of_a_wider_dtype():
    heads, _, _, grad_output = case(40, DIM, torch.bfloat16)
    _, cos, sin, _ = case(40, DIM, torch.float32)
    given = heads, cos, sin, grad_output
    found, expected = (value_and_gradient(function, *given) for function in (rotary_embedding, plain))
    assert torch.equal(found[0], expected[0])
    assert found[0].dtype == torch.float32
    # The formula's two products are rounded each, before they are added.
    truth = value_and_gradient(plain, *(tensor.double() for tensor in given))[1]
    errors = [(gradient.double() - truth).norm() for gradient in (found[1], expected[1])]
    assert found[1].dtype == torch.bfloat16
    assert errors[0] <= errors[1]


def test_nothing_as_large_as_the_heads_is_alive_beside_the_output(monkeypatch):
    monkeypatch.setattr(rotary, "chunks_in_cache", lambda tensor: 16)
    heads, cos, sin, grad_output = case(1024, DIM, torch.float32)
    unit = heads.numel() * heads.itemsize
    leaf = heads.detach().requires_grad_()
    angles = cos.numel() * cos.itemsize
    with LiveMemory() as memory:
        output = rotary_embedding(leaf, cos, sin)
        # The sines of a half, and a half of a chunk.
        assert memory.peak <= unit + angles / 2 + unit / 32
        memory.reset_peak()
        torch.autograd.grad(output, leaf, grad_output)
        assert memory.peak <= 2 * unit + angles / 2 + unit / 32
    assert chunks.chunks_in_cache(heads) == 1

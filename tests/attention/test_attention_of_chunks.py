"""Attention chunk by chunk, the earlier keys in blocks: against the dense truth over the whole sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dense_attention import dense_attention, heads, scores_of
from error_budget import EPS, relative_error
from in_chunks import Blocks, attend_in_chunks
from torch import Tensor

from mst_ds.attention import AttentionSpec, CausalAttention, Documents, KeyBlock
from mst_ds.attention.documents import Continued
from mst_ds.memory.live import LiveMemory

# fp64, sums of some tens of terms.
EXACT = {"rtol": 1e-12, "atol": 1e-13}
LENGTH = 24
# Borders of chunks, and the tokens of a block: one chunk, two, five; many blocks and one.
CUTS = [([0, 24], 24), ([0, 13, 24], 24), ([0, 13, 24], 3), ([0, 4, 5, 11, 20, 24], 7)]
# Documents that begin inside, at and before chunks; rows alike; rows that differ, in some chunks only.
STARTS = [None, [[0, 11]], [[0, 7, 13, 20], [0, 23]], [[0, 3], [0, 3]], [[0, 1, 2, 4, 5], [0, 5]]]


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 queries in a window, and of softcapped scores."""
    monkeypatch.setattr("mst_ds.geometry._WINDOW_QUERIES", 4)
    monkeypatch.setattr("mst_ds.geometry._ROWS", 4)
    monkeypatch.setattr("mst_ds.geometry._SCORES_OF_A_HEAD", 4)


def truth(tensors: list[Tensor], grad: Tensor, spec: AttentionSpec, starts: list[list[int]] | None) -> list[Tensor]:
    """What `attend_in_chunks` gives."""
    if starts is not None and len(starts) == 1:
        starts = starts * len(tensors[0])
    asked: dict[str, Any] = {"scaling": spec.scaling, "window": spec.window, "softcap": spec.softcap, "starts": starts}
    asked["sinks"] = tensors[3] if len(tensors) > 3 else None
    output = dense_attention(*tensors[:3], **asked).transpose(1, 2)
    sums = scores_of(*tensors[:2], **asked).logsumexp(dim=3)
    return [output, sums, *torch.autograd.grad(output, tensors, grad)]


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("starts", STARTS, ids=str)
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("asked", [{}, {"window": 1}, {"window": 5}, {"window": 15}, {"softcap": 1.5}], ids=str)
def test_values_and_gradients_in_fp64(asked: dict[str, Any], with_sinks: bool, starts: list[list[int]] | None) -> None:
    torch.manual_seed(0)
    tensors = heads(4, 2, 2, length=LENGTH, dims=(8, 8, 6))
    if with_sinks:
        tensors.append(torch.randn(4, dtype=torch.float64, requires_grad=True))
    grad, spec = torch.randn(2, 4, LENGTH, 6, dtype=torch.float64), AttentionSpec(0.3, **asked)
    expected = truth(tensors, grad, spec, starts)
    for borders, block_size in CUTS:
        found = attend_in_chunks(CausalAttention("sdpa", Documents(starts)), tensors, grad, spec, borders, block_size)
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 1, 1), (6, 2, 2)])
@pytest.mark.parametrize("dims", [(8, 8, 8), (12, 12, 8), (6, 6, 10)], ids=["alike", "narrow values", "wide values"])
def test_heads_of_other_numbers_and_widths(counts: tuple[int, ...], dims: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = heads(*counts, length=LENGTH, dims=dims)
    # As projections leave them: a token's heads beside each other.
    tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    grad, spec = torch.randn(2, counts[0], LENGTH, dims[2], dtype=torch.float64), AttentionSpec(0.3)
    for starts in STARTS[1:3]:
        found = attend_in_chunks(CausalAttention("sdpa", Documents(starts)), tensors, grad, spec, [0, 4, 5, 16, 24], 7)
        torch.testing.assert_close(found, truth(tensors, grad, spec, starts), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [{}, {"window": 100}, {"softcap": 1.5}], ids=str)
def test_rounding_is_that_of_one_call(asked: dict[str, Any], dtype: torch.dtype) -> None:
    # 32 chunks with up to 31 blocks.
    torch.manual_seed(0)
    length, spec = 512, AttentionSpec(0.3, **asked)
    tensors = heads(4, 2, 2, length=length, dims=(16,), batch=1, dtype=dtype)
    grad = torch.randn(1, 4, length, 16, dtype=dtype)
    exact = truth([x.double() for x in tensors], grad.double(), spec, None)
    attention, given = CausalAttention("sdpa"), [x.detach() for x in tensors]
    attended = attention.forward(*given, spec)
    once = [attended.output, attended.log_sum_exp, *attention.backward(grad, *given, attended, spec)]
    found = attend_in_chunks(attention, given, grad, spec, list(range(0, length + 1, 16)), 16)
    errors = [[relative_error(x, true) for x, true in zip(xs, exact, strict=True)] for xs in (found, once)]
    # The log-sum-exp is in fp32, however often it is merged.
    assert max(of_each.pop(1) for of_each in errors) <= 1e-4
    # A kernel rounds its part before parts are summed in fp32: as much again as the rounding of the sum.
    assert all(candidate <= 2**0.5 * reference + EPS for candidate, reference in zip(*errors, strict=True)), errors


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("starts", [None, [[0, 6], [0, 3, 9]]], ids=str)
@pytest.mark.parametrize("asked", [{}, {"window": 5}, {"softcap": 1.5, "sinks": True}], ids=str)
def test_dropout_is_the_same_in_the_backward(asked: dict[str, Any], starts: list[list[int]] | None) -> None:
    torch.manual_seed(0)
    asked = dict(asked)
    tensors = heads(2, 1, 1, length=12, dims=(2,))
    if asked.pop("sinks", False):
        tensors.append(torch.randn(2, dtype=torch.float64))
    tensors = [x.detach() for x in tensors]
    attention, spec = CausalAttention("sdpa", Documents(starts)), AttentionSpec(0.5, dropout=0.4, **asked)
    weights = torch.randn(2, 2, 12, 2, dtype=torch.float64)

    def run(*given: Tensor) -> list[Tensor]:
        return attend_in_chunks(attention, list(given), weights, spec, [0, 4, 9, 12], 3, seed=7)

    # Along one direction.
    direction = [torch.randn_like(x) for x in tensors]
    _, _, *grads = run(*tensors)
    slope = sum((grad * along).sum() for grad, along in zip(grads, direction, strict=True))
    step = 1e-5
    after, before = (
        (run(*(x + sign * step * along for x, along in zip(tensors, direction, strict=True)))[0] * weights).sum()
        for sign in (1, -1)
    )
    # Central differences are off by about step ** 2.
    torch.testing.assert_close(slope, (after - before) / (2 * step), rtol=1e-7, atol=1e-8)


def test_dropout_drops_its_share_of_each_block() -> None:
    # All scores are equal and all values 1: an output is the number of kept keys, scaled by 1 / (keys * kept share).
    query, value = torch.zeros(1, 2, 100, 8), torch.ones(1, 1, 100, 8)
    key, spec = query[:, :1], AttentionSpec(1.0, dropout=0.25)
    chunk, blocks = slice(400, 500), [KeyBlock(first, key, value) for first in range(0, 400, 100)]
    output = CausalAttention("sdpa").forward_chunk(chunk, query, key, value, blocks, spec).output[0, :, :, 0]
    kept = output * torch.arange(401, 501) * 0.75
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    # 90100 draws: a standard deviation is 0.14 %; of one query, 2 %, were the blocks' draws not the same 100.
    assert kept.sum() / (2 * torch.arange(401, 501).sum()) == pytest.approx(0.75, abs=0.007)
    assert (kept / torch.arange(401, 501)).std() == pytest.approx(0.0204, rel=0.15)


@pytest.mark.parametrize(
    ("starts", "window", "tokens", "expected"),
    [
        (None, None, slice(0, 4), 0),
        (None, None, slice(4, 8), 0),
        ([[0, 4]], None, slice(4, 8), 4),
        ([[0, 3, 6]], None, slice(4, 8), 3),
        ([[0, 4], [0, 2]], None, slice(4, 8), 2),
        (None, 1, slice(4, 8), 4),
        (None, 3, slice(4, 8), 2),
        (None, 9, slice(4, 8), 0),
        ([[0, 3]], 3, slice(4, 8), 3),
        ([[0, 1]], 3, slice(4, 8), 2),
        ([[0, 4]], 3, slice(4, 8), 4),
    ],
)
def test_earlier_keys_that_are_seen(starts: Any, window: int | None, tokens: slice, expected: int) -> None:
    attention = CausalAttention("sdpa", Documents(starts))
    assert attention.earlier_keys(tokens, AttentionSpec(1.0, window=window)) == slice(expected, tokens.start)


def no_blocks() -> Iterator[KeyBlock]:
    pytest.fail("no earlier key is seen, and a block is asked for")
    yield


@pytest.mark.parametrize("asked", [{}, {"window": 5}, {"dropout": 0.2}], ids=str)
def test_what_sees_no_earlier_key_is_what_one_call_computes(asked: dict[str, Any]) -> None:
    torch.manual_seed(0)
    spec, grad = AttentionSpec(0.3, **asked), torch.randn(2, 4, 9, 8)
    tensors = [x.detach() for x in heads(4, 2, 2, length=9, dtype=torch.float32)]
    whole, inside = CausalAttention("sdpa", Documents([[0, 6]])), CausalAttention("sdpa", Documents([[0, 3, 9, 12]]))

    def run(attention: CausalAttention, tokens: slice | None) -> list[Tensor]:
        torch.manual_seed(1)
        if tokens is None:
            attended = attention.forward(*tensors, spec)
            return [attended.output, attended.log_sum_exp, *attention.backward(grad, *tensors, attended, spec)]
        attended = attention.forward_chunk(tokens, *tensors, no_blocks(), spec)
        grads = attention.backward_chunk(tokens, grad, *tensors, no_blocks(), attended, spec, None, None)
        return [attended.output, attended.log_sum_exp, *grads]

    expected = run(whole, None)
    torch.testing.assert_close(run(whole, slice(0, 9)), expected, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(CausalAttention("sdpa"), slice(0, 9)), expected)
    expected = run(CausalAttention("sdpa", Documents([[0, 3]])), None)
    torch.testing.assert_close(run(inside, slice(9, 18)), expected, rtol=0, atol=0)


def peak_bytes(before: int, chunk: int, **asked: Any) -> int:
    """Of a chunk's forward and backward beside what it is given, the blocks one by one."""
    torch.manual_seed(0)
    key, value = (torch.randn(1, 1, before, 16) for _ in range(2))
    query, own_key, own_value, grad = (torch.randn(1, count, chunk, 16) for count in (8, 1, 1, 8))
    attention, spec, tokens = CausalAttention("sdpa"), AttentionSpec(0.3, **asked), slice(before, before + chunk)
    blocks = Blocks(key, value, before, 256)
    with LiveMemory() as memory:
        attended = attention.forward_chunk(tokens, query, own_key, own_value, blocks, spec)
        attention.backward_chunk(tokens, grad, query, own_key, own_value, blocks, attended, spec, None, lambda *_: None)
    return memory.peak


def test_memory_is_that_of_a_chunk_and_a_block() -> None:
    assert peak_bytes(4096, 256) == peak_bytes(512, 256)
    assert peak_bytes(4096, 256, window=300) == peak_bytes(512, 256, window=300)
    print(peak_bytes(4096, 256) / (8 * 256 * 16 * 4))


def test_documents_are_found_once_for_all_layers() -> None:
    documents, tokens = Documents([[0, 3, 9], [0, 5]]), slice(4, 12)
    assert documents.within(tokens) is documents.within(slice(4, 12))
    assert documents.continued(2, tokens) is documents.continued(2, slice(4, 12))


def test_documents_in_a_range() -> None:
    # Before, at, inside and behind its borders; in rows alike and in rows that differ.
    documents = Documents([[0, 3, 4, 9], [0, 4, 9], [0, 3, 6], [0, 3, 6], [0, 3]])
    assert documents.within(slice(4, 9)).starts == [[0], [0], [0, 2], [0, 2], [0]]
    assert documents.continued(5, slice(4, 9)) == [Continued(slice(2, 4), 3, 6), Continued(slice(4, 5), 3, 9)]
    assert Documents([[0, 3]]).continued(5, slice(4, 9)) == [Continued(slice(0, 5), 3, 9)]
    assert Documents().continued(5, slice(4, 9)) == [Continued(slice(0, 5), 0, 9)]
    assert not Documents().continued(5, slice(0, 9))

"""Attention of a sequence's last queries to all of it, with its log-sum-exp: what a chunk of a stream asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_attention import dense_attention, heads, scores_of

from mst_ds.attention import AttentionSpec, CausalAttention, Documents

# fp64, sums of some tens of terms.
EXACT = {"rtol": 1e-12, "atol": 1e-13}
LENGTH = 24
STARTS = [[0, 7, 20], [0, 23]]


@pytest.mark.parametrize("queries", [LENGTH, 17, 9, 1])
@pytest.mark.parametrize("starts", [None, STARTS], ids=["one document", "documents"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("asked", [{}, {"window": 5}, {"window": 12}, {"softcap": 1.5}], ids=str)
def test_the_last_queries(
    monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], with_sinks: bool, starts: Any, queries: int
) -> None:
    monkeypatch.setattr("mst_ds.geometry._WINDOW_QUERIES", 4)
    monkeypatch.setattr("mst_ds.geometry._ROWS", 4)
    monkeypatch.setattr("mst_ds.geometry._SCORES_OF_A_HEAD", 4)
    torch.manual_seed(0)
    tensors = heads(4, 2, 2, length=LENGTH, dims=(8, 8, 6))
    sinks = [torch.randn(4, dtype=torch.float64, requires_grad=True)] if with_sinks else []
    grad = torch.randn(2, 4, queries, 6, dtype=torch.float64)
    tail = slice(LENGTH - queries, LENGTH)

    asked_of_dense = {**asked, "sinks": sinks[0] if sinks else None, "starts": starts}
    whole = dense_attention(*tensors, scaling=0.3, **asked_of_dense).transpose(1, 2)[:, :, tail]
    expected = list(torch.autograd.grad(whole, [*tensors, *sinks], grad))
    expected[0] = expected[0][:, :, tail]
    scores = scores_of(*tensors[:2], scaling=0.3, **asked_of_dense)

    attention, spec = CausalAttention("sdpa", Documents(starts)), AttentionSpec(0.3, **asked)
    given = [tensors[0][:, :, tail].detach(), *(x.detach() for x in (*tensors[1:], *sinks))]
    attended = attention.forward(*given[:3], spec, *given[3:])
    torch.testing.assert_close(attended.output, whole, **EXACT)
    torch.testing.assert_close(attended.log_sum_exp, scores.logsumexp(dim=3)[:, :, tail], **EXACT)
    found = attention.backward(grad, *given[:3], attended, spec, *given[3:])
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("asked", [{}, {"window": 50}], ids=str)
def test_a_merged_result_is_as_exact_as_one_call(asked: dict[str, Any]) -> None:
    # In 16 bits each part is rounded before they are merged.
    torch.manual_seed(0)
    tensors = [x.detach() for x in heads(4, 2, 2, length=256, dims=(16,), batch=1, dtype=torch.bfloat16)]
    exact = dense_attention(*(x.double() for x in tensors), scaling=0.3, **asked).transpose(1, 2)[:, :, 128:]
    plain = dense_attention(*tensors, scaling=0.3, **asked).transpose(1, 2)[:, :, 128:]
    query, key, value = tensors
    merged = CausalAttention("sdpa").forward(query[:, :, 128:], key, value, AttentionSpec(0.3, **asked)).output
    assert (merged - exact).norm() <= 1.05 * (plain - exact).norm()

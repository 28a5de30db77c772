"""Attention to picked keys against the dense truth, on one device and sharded, and what it is not there for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_on_cpu import cuda_on_cpu
from dense_attention import heads, scores_of
from torch import Tensor, nn

from mst_ds.attention import AttentionSpec, CausalAttention, CausalMask, Documents
from mst_ds.attention.choice import choose_indexed_kernel
from mst_ds.attention.indexed import Indexed
from mst_ds.attention.over_blocks import OverBlocks
from mst_ds.attention.per_document import PerDocument
from mst_ds.attention.torch_kernels import Efficient
from mst_ds.memory.live import LiveMemory
from mst_ds.sequence_parallel import UlyssesContext, run_simulated, ulysses_attention

# fp64, sums of some tens of terms.
EXACT = {"rtol": 1e-12, "atol": 1e-13}
LENGTH, PICKED = 24, 3
STARTS = [[0, 7, 9], [0, 22]]


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 queries, so that a document of some tokens has several, the last shorter."""
    monkeypatch.setattr("mst_ds.geometry._ROWS", 4)
    monkeypatch.setattr("mst_ds.geometry._SCORES_OF_A_HEAD", 4)


def random_picks() -> Tensor:
    """(2, S, k): of each query one earlier position of the row at least, and any others, -1 among them."""
    picks = torch.randint(-1, LENGTH, (2, LENGTH, PICKED), dtype=torch.int32)
    picks[:, :, 0] = torch.arange(LENGTH)
    return picks


def truth(tensors: list[Tensor], grad: Tensor, picks: Tensor, starts: list[list[int]], **asked: Any) -> list[Tensor]:
    """A query with no more keys in its document than are picked sees all of them."""
    is_picked = torch.zeros(2, LENGTH, LENGTH + 1, dtype=torch.bool)
    is_picked.scatter_(2, picks.long().where(picks >= 0, LENGTH), True)
    for row, first in enumerate(starts):
        for start in first:
            is_picked[row, start : start + PICKED] = True
    scores = scores_of(*tensors[:2], scaling=0.3, starts=starts, **asked)
    hidden = ~torch.nn.functional.pad(is_picked[:, None, :, :-1], (0, scores.shape[3] - LENGTH), value=True)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=3)[..., :LENGTH]
    value = tensors[2].repeat_interleave(tensors[0].shape[1] // tensors[2].shape[1], dim=1)
    output = (weights @ value).transpose(1, 2)
    return [output, *torch.autograd.grad(output, tensors, grad)]


@pytest.mark.parametrize("starts", [[[0], [0]], STARTS], ids=["one document", "documents"])
@pytest.mark.parametrize("sp_size", [1, 2, 3])
def test_values_and_gradients_in_fp64(sp_size: int, starts: list[list[int]]) -> None:
    torch.manual_seed(0)
    tensors = heads(6, 3, 3, length=LENGTH, dims=(8, 8, 6))
    tensors.append(torch.randn(6, dtype=torch.float64, requires_grad=True))
    grad = torch.randn(2, LENGTH, 6, 6, dtype=torch.float64)
    picks = random_picks()

    def attend(group: Any) -> tuple[Tensor, list[Tensor]]:
        rank = 0 if group is None else group.rank
        leaves = [x.detach().chunk(sp_size, dim=2)[rank].clone().requires_grad_() for x in tensors[:3]]
        leaves.append(tensors[3].detach().clone().requires_grad_())
        context = UlyssesContext(group, "sdpa", starts)
        of_shard = picks.chunk(sp_size, dim=1)[rank]
        output, _ = ulysses_attention(
            nn.Identity(),
            *leaves[:3],
            CausalMask(),
            scaling=0.3,
            ulysses=context,
            indices=of_shard,
            s_aux=leaves[3],
        )
        return output, list(torch.autograd.grad(output, leaves, grad.chunk(sp_size, dim=1)[rank]))

    outputs, grads = zip(*(run_simulated(attend, sp_size) if sp_size > 1 else [attend(None)]), strict=True)
    *of_shards, of_sinks = zip(*grads, strict=True)
    found = [torch.cat(outputs, dim=1), *(torch.cat(parts, dim=2) for parts in of_shards), sum(of_sinks)]
    torch.testing.assert_close(found, truth(tensors, grad, picks, starts, sinks=tensors[3]), **EXACT)


def test_the_kernel_of_cuda_gets_the_same_picks() -> None:
    torch.manual_seed(0)
    tensors, picks = heads(4, 2, 2, length=LENGTH), random_picks()
    grad = torch.randn(2, 4, LENGTH, 8, dtype=torch.float64)  # of heads first, as kernels have it
    given, spec, documents = [tensor.detach() for tensor in tensors], AttentionSpec(0.3), Documents(STARTS)
    kernel = Indexed(PerDocument(OverBlocks(Efficient())), Efficient(), picks)
    with cuda_on_cpu() as kernels:
        attended = kernel.forward(*given, spec, documents)
        found = [attended.output, *kernel.backward(grad, *given, attended, spec, documents)]
    assert kernels.calls["efficient forward"] == kernels.calls["efficient backward"] > 1
    found[0] = found[0].transpose(1, 2)
    torch.testing.assert_close(found, truth(tensors, grad.transpose(1, 2), picks, STARTS), **EXACT)


def peak_bytes(length: int) -> int:
    tensors = heads(2, 2, 2, length=length, batch=1, dtype=torch.float32)
    picks = torch.randint(0, length, (1, length, 8), dtype=torch.int32)
    attention = CausalAttention("sdpa", Documents(), picks)
    with LiveMemory() as memory, torch.no_grad():
        attended = attention.forward(*tensors, AttentionSpec(0.3))
        attention.backward(torch.ones_like(attended.output), *tensors, attended, AttentionSpec(0.3))
    return memory.peak


def test_memory_is_linear_in_the_length() -> None:
    assert peak_bytes(512) < 2.1 * peak_bytes(256)


@pytest.mark.parametrize("asked", [{"dropout": 0.1}, {"softcap": 1.0}, {"window": 5}], ids=str)
def test_what_takes_no_mask_is_refused(asked: dict[str, Any]) -> None:
    query, picks = torch.zeros(1, 2, LENGTH, 8), torch.zeros(1, LENGTH, PICKED, dtype=torch.int32)
    with pytest.raises(ValueError, match="attention to picked keys is not there with a window, with a softcap"):
        choose_indexed_kernel("sdpa", query, AttentionSpec(0.3, **asked), Documents(), {}, picks)
    # Documents that are no longer than what is picked see all of it.
    short = Documents([list(range(0, LENGTH, PICKED))])
    assert not isinstance(choose_indexed_kernel("sdpa", query, AttentionSpec(0.3, **asked), short, {}, picks), Indexed)


@pytest.mark.parametrize(
    ("indices", "text"),
    [
        (None, "Identity has an indexer and hands no indices"),
        (torch.zeros(1, LENGTH - 1, PICKED, dtype=torch.int32), r"hands indices \(1, 23, 3\) in torch.int32"),
        (torch.zeros(1, LENGTH, PICKED), r"allowed: whole numbers \(1, 24, picked keys\)"),
    ],
    ids=["none", "of other tokens", "fractions"],
)
def test_other_picks_are_refused(indices: Tensor | None, text: str) -> None:
    query = torch.zeros(1, 2, LENGTH, 8)
    with pytest.raises(ValueError, match=text):
        ulysses_attention(
            nn.Identity(),
            query,
            query,
            query,
            CausalMask(),
            ulysses=UlyssesContext(None, "sdpa", None),
            indices=indices,
        )

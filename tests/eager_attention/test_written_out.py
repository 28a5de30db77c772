"""Attention in the ways that models write it out: what all scores and a mask give, packed too, and nothing of S x S."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_attention import dense_attention, heads, scores_of
from torch import Tensor, nn
from torch.nn import functional

from mst_ds.attention import AttentionBlocks, SlidingWindow
from mst_ds.eager_attention import EagerAttention
from mst_ds.eager_attention.masks import EagerMask
from mst_ds.memory.live import LiveMemory
from mst_ds.sequence_parallel import UlyssesContext

HEADS, LENGTH, WIDTH = 6, 23, 4
SCALE = 1 / math.sqrt(WIDTH)
STARTS = [[0, 9, 10], [0, 17]]
WINDOW = 5
SLOPES = torch.tensor([2.0 ** -(8 * (head + 1) / HEADS) for head in range(HEADS)], dtype=torch.float64)

Tensors = tuple[Tensor, Tensor, Tensor]


def flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, 1)


def gptj(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    weights = torch.matmul(query, key.transpose(-1, -2)) / module.scale + mask
    weights = functional.softmax(weights, dim=-1).to(value.dtype)
    return torch.matmul(module.dropout(weights), value)


def codegen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    scores = query @ key.transpose(-1, -2)
    scores += mask
    scores /= module.scale
    return nn.Softmax(dim=-1)(scores) @ value


def gpt_neo(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    scores = torch.matmul(query, key.mT) * SCALE
    seen = module.seen[:, :, : query.shape[2], : key.shape[2]]
    lowest = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return torch.where(seen, scores, lowest).softmax(-1) @ value


def gpt(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    scores = torch.matmul(query, key.mT) / module.scale
    seen = module.bias[:, :, : scores.size(-2), : scores.size(-1)]
    scores = scores * seen + -1e4 * (1 - seen)
    return torch.matmul(functional.softmax(scores, dim=-1), value)


def mpt(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    scores = torch.matmul(query, key.mT) * SCALE + module.alibi[:, :, -query.shape[2] :]
    scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
    return torch.matmul(functional.softmax(scores.float(), dim=-1).to(value.dtype), value)


def bloom(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    alibi = (SLOPES[:, None, None] * torch.arange(query.shape[2])).repeat(len(query), 1, 1)
    scores = alibi.baddbmm(batch1=flat(query), batch2=flat(key).mT, beta=1.0, alpha=SCALE)
    scores = scores.view(len(query), HEADS, query.shape[2], -1) + mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.bmm(weights.view(-1, *scores.shape[2:]), flat(value)).view(query.shape)


def falcon(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    scores = query @ key.mT + (SLOPES[:, None, None] / SCALE * torch.arange(query.shape[2]))[None]
    scores *= SCALE
    return functional.softmax(scores + mask, dim=-1) @ value


def xglm(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    scores = torch.bmm(flat(query * SCALE), flat(key).transpose(1, 2))
    scores = scores.view(*mask.size()[:1], HEADS, *mask.size()[2:]) + mask
    scores = torch.max(scores, torch.full((), torch.finfo(torch.float32).min))
    weights = functional.softmax(scores.view(-1, *mask.size()[2:]), dim=-1)
    return torch.bmm(functional.dropout(weights, p=0.0, training=True), flat(value)).view(query.shape)


def gpt_neox_japanese(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    zeros = torch.zeros(len(query) * HEADS, query.shape[2], key.shape[2], dtype=query.dtype, device=key.device)
    scores = torch.baddbmm(zeros, flat(query), flat(key).transpose(1, 2), beta=1.0, alpha=SCALE)
    return functional.softmax(scores.view(len(query), HEADS, query.shape[2], -1) + mask, dim=-1) @ value


def of_torch(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def of_torch_causal(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=SCALE)


Write = Callable[[Any, Tensor, Tensor, Tensor, Any], Tensor]


class Module(nn.Module):
    """Attention of what it is given: its hidden states are the queries."""

    def __init__(self, write: Write, given: Tensors, window: int | None = None, longest: int = 2 * LENGTH) -> None:
        super().__init__()
        self.write, self.given, self.scale = write, given, math.sqrt(WIDTH)
        self.dropout = nn.Dropout(0.0)
        seen = torch.ones(1, 1, longest, longest).tril()
        self.bias = nn.Buffer(seen)
        self.seen = nn.Buffer(seen.bool() if window is None else seen.triu(1 - window).bool())
        self.alibi = (torch.arange(1 - longest, 1) * SLOPES.view(-1, 1, 1)).view(HEADS, 1, longest)

    def forward(self, hidden_states: Tensor, mask: Any = None) -> tuple[Tensor, Any]:
        query, key, value = self.given
        return self.write(self, query, key, value, mask), None


CAUSAL = EagerMask(None)


def written(
    write: Write, given: Tensors, mask: Any = CAUSAL, starts: Any = STARTS, window: int | None = None
) -> Tensor:
    """(B, N, S, D), by this project."""
    module = Module(write, given, window)
    length = given[0].shape[2]
    positions = torch.arange(length).expand(len(given[0]), -1).clone()
    for row, of_row in zip(positions, starts or [], strict=True):
        for start in of_row:
            row[start:] = torch.arange(length - start)
    context = UlyssesContext(None, "sdpa", starts, positions=positions)
    output, _ = EagerAttention(module).run(
        module.forward, context, None, torch.zeros(len(given[0]), length, 1, dtype=torch.float64), mask=mask
    )
    return output


def inputs(kv_heads: int = HEADS, length: int = LENGTH) -> Tensors:
    torch.manual_seed(0)
    query, key, value = heads(HEADS, kv_heads, kv_heads, length=length, dims=(WIDTH,))
    return query, key, value


def same_with_gradients(found: Tensor, expected: Tensor, given: Tensors) -> None:
    weights = torch.randn_like(expected)
    of_found, of_expected = (torch.autograd.grad(each, given, weights) for each in (found, expected))
    for ours, theirs in zip((found, *of_found), (expected, *of_expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


PLAIN = [gptj, codegen, gpt_neo, gpt, xglm, gpt_neox_japanese, of_torch, of_torch_causal]


@pytest.mark.parametrize("write", PLAIN)
def test_written_attention_is_attention(write: Write) -> None:
    given = inputs()
    expected = dense_attention(*given, scaling=SCALE, starts=STARTS).transpose(1, 2)
    same_with_gradients(written(write, given), expected, given)


@pytest.mark.parametrize("write", [mpt, bloom, falcon])
def test_biases_of_positions_are_in_it(write: Write) -> None:
    """What a model counts from the row's start on, or back from its end, is of no account to a document."""
    given = inputs()
    seen = scores_of(given[0], given[1], scaling=SCALE, starts=STARTS)
    scores = seen + SLOPES[:, None, None] * torch.arange(LENGTH)
    mask = EagerMask(None).to(dtype=torch.bool).to("cpu") if write is mpt else EagerMask(None)
    same_with_gradients(written(write, given, mask), scores.softmax(-1) @ given[2], given)


@pytest.mark.parametrize(
    ("write", "mask"), [(gpt_neo, EagerMask(None)), (gptj, EagerMask(SlidingWindow(WINDOW)))], ids=["buffer", "mask"]
)
def test_windows_are_in_it(write: Write, mask: EagerMask) -> None:
    given = inputs()
    expected = dense_attention(*given, scaling=SCALE, starts=STARTS, window=WINDOW).transpose(1, 2)
    same_with_gradients(written(write, given, mask, window=WINDOW), expected, given)


def test_blocks_are_in_it() -> None:
    given = inputs()
    starts = [[0, 8, 16]] * 2
    expected = dense_attention(*given, scaling=SCALE, starts=starts).transpose(1, 2)
    same_with_gradients(written(gptj, given, EagerMask(AttentionBlocks(8)), starts=[[0], [0]]), expected, given)


def test_one_key_of_all_heads() -> None:
    given = inputs(kv_heads=1)
    expected = dense_attention(*given, scaling=SCALE, starts=STARTS).transpose(1, 2)
    same_with_gradients(written(codegen, given), expected, given)


def test_dropout_is_that_of_attention() -> None:
    """Probabilities that are dropped, and the others scaled up: of values of one, the mean stays one."""

    def drops(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        weights = functional.softmax(query @ key.mT + mask, dim=-1)
        return functional.dropout(weights, p=0.25, training=True) @ value

    query, key, value = inputs()
    torch.manual_seed(0)
    output = written(drops, (query, key, torch.ones_like(value)))
    assert not torch.allclose(output, torch.ones_like(output))
    assert abs(float(output.detach().mean()) - 1) < 0.05


@pytest.mark.parametrize("write", [*PLAIN, mpt, bloom])
def test_nothing_of_all_tokens_to_all_is_alive(write: Write) -> None:
    """One row, one head more would not fit: the scores of a single head are more than all that there is."""
    length = 1536
    given = inputs(length=length)
    module = Module(write, given, longest=length)
    mask = EagerMask(None).to(torch.bool) if write is mpt else EagerMask(None)
    context = UlyssesContext(None, "sdpa", None, positions=torch.arange(length)[None])
    attention, hidden_states = EagerAttention(module), torch.zeros(2, length, 1, dtype=torch.float64)
    attention.run(module.forward, context, None, hidden_states, mask=mask)  # looks at the buffers
    with LiveMemory() as memory:
        output, _ = attention.run(module.forward, context, None, hidden_states, mask=mask)
        output.sum().backward()
    assert 0 < memory.peak < length * length * given[0].itemsize


def softmax_of_queries(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return (query @ key.mT + mask).softmax(dim=-2) @ value


def no_mask(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return (query @ key.mT).softmax(dim=-1) @ value


def no_softmax(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return (query @ key.mT + mask) @ value


def softcap(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return ((query @ key.mT).tanh() + mask).softmax(dim=-1) @ value


def einsum(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return torch.einsum("bnqd,bnkd->bnqk", query, key).softmax(dim=-1) @ value


def in_place(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    scores = query @ key.mT
    scores.mul_(SCALE)
    return (scores + mask).softmax(dim=-1) @ value


def of_all_pairs(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return (query @ key.mT + torch.randn(LENGTH, LENGTH) + mask).softmax(dim=-1) @ value


def not_linear(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return (query @ key.mT + torch.arange(LENGTH).double().square()[None] + mask).softmax(dim=-1) @ value


def of_rows(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    bias = torch.arange(LENGTH) * torch.arange(2).view(2, 1, 1, 1)
    return (query @ key.mT + bias + mask).softmax(dim=-1) @ value


def learned(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return (query @ key.mT + torch.zeros(1, LENGTH, requires_grad=True) + mask).softmax(dim=-1) @ value


def hidden_by_little(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    seen = module.bias[:, :, :LENGTH, :LENGTH]
    return (query @ key.mT + -5.0 * (1 - seen)).softmax(dim=-1) @ value


def only_zero(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return (query @ key.mT * module.bias[:, :, :LENGTH, :LENGTH]).softmax(dim=-1) @ value


def hidden_weights(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return ((query @ key.mT + mask).softmax(dim=-1) * module.bias[:, :, :LENGTH, :LENGTH]) @ value


def raised_weights(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return ((query @ key.mT + mask).softmax(dim=-1) + 1e-3) @ value


def with_sinks(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    sinks = torch.zeros(2, HEADS, LENGTH, 1)
    return torch.cat([query @ key.mT + mask, sinks], dim=-1).softmax(dim=-1)[..., :-1] @ value


def rolled(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    module.seen.copy_(module.seen.roll(1, dims=-1))
    return gpt_neo(module, query, key, value, mask)


def detached(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    return (query @ key.mT + mask).softmax(dim=-1).detach() @ value


REFUSED = {
    detached: "detaches its attention's scores or weights",
    softmax_of_queries: "takes a softmax over something else than the keys",
    no_mask: "does not hide the keys that are to come",
    no_softmax: "multiplies values by scores without a softmax",
    softcap: "calls tanh on its attention's scores",
    einsum: "attends in another way than by products and a softmax",
    in_place: r"calls add on its attention's scores or mask again",
    of_all_pairs: "adds a tensor of all tokens to all",
    not_linear: "does not grow with the position of keys alone",
    of_rows: "does not grow with the position of keys alone",
    learned: "learns what it adds",
    hidden_by_little: "hides keys by -5.0",
    only_zero: "does not hide the keys that are to come",
    raised_weights: "adds to its attention's weights",
    with_sinks: "calls cat on its attention's scores",
    hidden_weights: "multiplies its attention's scores by a tensor",
    rolled: "hides keys by a mask of its own",
}


@pytest.mark.parametrize("write", REFUSED)
def test_what_is_not_understood_is_refused_by_name(write: Write) -> None:
    with pytest.raises(ValueError, match=rf"^Module .*{REFUSED[write]}.*, which mst_ds's attention does not know$"):
        written(write, inputs())

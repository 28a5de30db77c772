"""Attention without a model: values and gradients against the dense truth, memory, and what each kernel is handed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense_attention import dense_attention, heads, visible
from distributed import run_ranks
from torch import Tensor, nn

from mst_ds.attention import AttentionSpec, CausalAttention, Documents, SlidingWindow
from mst_ds.geometry import HeadLayout
from mst_ds.memory.live import LiveMemory
from mst_ds.sequence_parallel import SequenceGroup, UlyssesContext, new_sequence_group, run_simulated, ulysses_attention
from mst_ds.sequence_parallel.head_exchange import HeadExchange
from mst_ds.sequence_parallel.sequence_attention import SequenceAttention

# fp64, sums of some tens of terms.
EXACT = {"rtol": 1e-12, "atol": 1e-13}
LENGTH = 24
STARTS = [[0, 7, 20], [0, 23]]


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 4 queries, so that a document of some tokens has several, the last shorter."""
    monkeypatch.setattr("mst_ds.geometry._WINDOW_QUERIES", 4)
    monkeypatch.setattr("mst_ds.geometry._ROWS", 4)
    monkeypatch.setattr("mst_ds.geometry._SCORES_OF_A_HEAD", 4)


def attend_shard(
    group: SequenceGroup | None, tensors: list[Tensor], grad: Tensor, starts: list[list[int]] | None, **asked: Any
) -> tuple[Tensor, list[Tensor]]:
    """A rank's part of the output, and the gradients of its shard of query, key, value and of all sinks if given."""
    size, rank = (1, 0) if group is None else (group.size, group.rank)
    leaves = [x.detach().chunk(size, dim=2)[rank].clone().requires_grad_() for x in tensors[:3]]
    leaves += [x.detach().clone().requires_grad_() for x in tensors[3:]]
    output, _ = ulysses_attention(
        nn.Identity(),
        *leaves[:3],
        None,
        scaling=0.3,
        ulysses=UlyssesContext(group, "sdpa", starts),
        s_aux=leaves[3] if len(leaves) > 3 else None,
        **asked,
    )
    return output, list(torch.autograd.grad(output, leaves, grad.chunk(size, dim=1)[rank]))


def put_together(parts: list[tuple[Tensor, list[Tensor]]]) -> list[Tensor]:
    """Output and gradients of the whole sequence, from those of its shards; sinks' gradients are summed."""
    outputs, grads = zip(*parts, strict=True)
    shards = [torch.cat(of_tensor, dim=2) for of_tensor in list(zip(*grads, strict=True))[:3]]
    return [torch.cat(outputs, dim=1), *shards, *(sum(of_sinks) for of_sinks in list(zip(*grads, strict=True))[3:])]


def truth(tensors: list[Tensor], grad: Tensor, starts: list[list[int]] | None, **asked: Any) -> list[Tensor]:
    sinks = tensors[3] if len(tensors) > 3 else None
    asked = {"window": asked.get("sliding_window"), "softcap": asked.get("softcap"), "sinks": sinks}
    output = dense_attention(*tensors[:3], scaling=0.3, starts=starts, **asked)
    return [output, *torch.autograd.grad(output, tensors, grad)]


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("starts", [None, STARTS], ids=["one document", "documents"])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 5, 9])
def test_values_and_gradients_in_fp64(
    window: int | None, softcap: float | None, with_sinks: bool, starts: list[list[int]] | None
) -> None:
    # 9 heads over 2 ranks: 5 and 4, whose first key/value heads have 3 and 1 of them.
    torch.manual_seed(0)
    tensors = heads(9, 3, 3, length=LENGTH)
    if with_sinks:
        tensors.append(torch.randn(9, dtype=torch.float64, requires_grad=True))
    grad = torch.randn(2, LENGTH, 9, 8, dtype=torch.float64)
    asked = {"sliding_window": window, "softcap": softcap}
    expected = truth(tensors, grad, starts, **asked)
    alone = attend_shard(None, tensors, grad, starts, **asked)
    torch.testing.assert_close([alone[0], *alone[1]], expected, **EXACT)
    for size in (2, 3):
        parts = run_simulated(lambda group: attend_shard(group, tensors, grad, starts, **asked), size)
        torch.testing.assert_close(put_together(parts), expected, **EXACT)


@pytest.mark.parametrize("counts", [(4, 4, 4), (4, 1, 1), (6, 2, 2)])
@pytest.mark.parametrize("dims", [(12, 12, 8), (6, 6, 10)], ids=["narrow values", "wide values"])
@pytest.mark.parametrize("asked", [{}, {"sliding_window": 5}, {"softcap": 2.0}], ids=["causal", "window", "softcap"])
def test_values_of_another_width(counts: tuple[int, ...], dims: tuple[int, ...], asked: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tensors = heads(*counts, length=LENGTH, dims=dims)
    grad = torch.randn(2, LENGTH, counts[0], dims[2], dtype=torch.float64)
    parts = run_simulated(lambda group: attend_shard(group, tensors, grad, STARTS, **asked), 2)
    torch.testing.assert_close(put_together(parts), truth(tensors, grad, STARTS, **asked), **EXACT)


def on_real_ranks(rank: int) -> tuple[Tensor, list[Tensor]]:
    group = new_sequence_group(2)
    torch.manual_seed(0)
    tensors = [*heads(9, 3, 3, length=LENGTH, dims=(8, 8, 6)), torch.randn(9, dtype=torch.float64)]
    grad = torch.randn(2, LENGTH, 9, 6, dtype=torch.float64)
    output, grads = attend_shard(group, tensors, grad, STARTS, sliding_window=5)
    return output.detach(), grads


def test_real_ranks_compute_what_simulated_ones_do() -> None:
    torch.manual_seed(0)
    tensors = [*heads(9, 3, 3, length=LENGTH, dims=(8, 8, 6)), torch.randn(9, dtype=torch.float64, requires_grad=True)]
    grad = torch.randn(2, LENGTH, 9, 6, dtype=torch.float64)
    expected = truth(tensors, grad, STARTS, sliding_window=5)
    torch.testing.assert_close(put_together(run_ranks(on_real_ranks, 2)), expected, **EXACT)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    sinks: Tensor | None = None,
    starts: list[list[int]] | None = None,
) -> Tensor:
    """(B, S, N, Dv), on one device, differentiable."""
    layout = HeadLayout(query.shape[1], key.shape[1], 1)
    attention = SequenceAttention(CausalAttention("sdpa", Documents(starts)), spec, HeadExchange(None, layout))
    return attention(query, key, value, sinks)


def run_spec(tensors: list[Tensor], spec: AttentionSpec) -> list[Tensor]:
    """Output and gradients of its sum of squares."""
    output = attend(*tensors[:3], spec, *tensors[3:])
    return [output, *torch.autograd.grad(output.square().sum(), tensors)]


@pytest.mark.parametrize("window", [None, 5])
def test_transformers_softcap_and_sinks(window: int | None) -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

    torch.manual_seed(0)
    tensors = heads(4, 2, 2, length=LENGTH)
    mask = torch.zeros(LENGTH, LENGTH, dtype=torch.float64).masked_fill(~visible(LENGTH, window), float("-inf"))
    module = nn.Module()
    module.num_key_value_groups, module.sinks = 2, torch.randn(4, dtype=torch.float64, requires_grad=True)
    output, _ = gemma2(module, *tensors, mask, scaling=0.3, softcap=1.5)
    # It computes the softmax in fp32.
    ours = run_spec(tensors, AttentionSpec(0.3, window=window, softcap=1.5))[0]
    torch.testing.assert_close(ours, output, rtol=1e-6, atol=1e-6)

    output, _ = gpt_oss(module, *tensors, mask, scaling=0.3)
    tensors.append(module.sinks)
    ours = run_spec(tensors, AttentionSpec(0.3, window=window))
    expected = [output, *torch.autograd.grad(output.square().sum(), tensors)]
    torch.testing.assert_close(ours, expected, **EXACT)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize(
    "asked", [{"softcap": 5.0}, {"softcap": 5.0, "window": 50, "sinks": True}, {"sinks": True}], ids=str
)
def test_sixteen_bits_are_as_exact_as_dense_attention(asked: dict[str, Any]) -> None:
    # With blocks of 4 queries a key's gradient is a sum of up to 64 terms, which must not be rounded each time.
    torch.manual_seed(0)
    tensors = heads(2, 1, 1, length=256, dims=(16,), batch=1)
    sinks = [torch.randn(2, dtype=torch.float64)] if "sinks" in asked else []
    grad = torch.randn(1, 256, 2, 16, dtype=torch.float64)

    def run(attention: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().bfloat16().to(dtype).requires_grad_() for x in tensors + sinks]
        output = attention(*leaves[:3], scaling=0.3, **{**asked, "sinks": leaves[3] if sinks else None})
        return [output, *torch.autograd.grad(output, leaves[:3], grad.bfloat16().to(dtype))]

    def ours(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, **spec: Any) -> Tensor:
        return attend(query, key, value, AttentionSpec(**spec), sinks)

    results = run(dense_attention, torch.float64), run(ours, torch.bfloat16), run(dense_attention, torch.bfloat16)
    for exact, candidate, plain in zip(*results, strict=True):
        assert (candidate - exact).norm() <= 1.05 * (plain - exact).norm()


@pytest.mark.parametrize("asked", [{}, {"window": 3}, {"softcap": 50.0}], ids=str)
def test_a_sink_is_not_rounded_to_sixteen_bits(asked: dict[str, Any]) -> None:
    # All scores are 0 and all values 1. sink / scaling is halfway between two numbers of bf16, 0.125 apart.
    sink, length = 0.3 * 16.0625, 7
    query, value = torch.zeros(1, 1, length, 8).bfloat16(), torch.ones(1, 1, length, 8).bfloat16()
    output = attend(query, query, value, AttentionSpec(0.3, **asked), torch.tensor([sink]))
    seen = torch.arange(1, length + 1).clamp(max=asked.get("window", length))
    # A kernel rounds to bf16 a few times, by 2**-9 each; a rounded sink would be off by 2 %.
    torch.testing.assert_close(output[0, :, 0, 0].float(), seen / (seen + math.exp(sink)), rtol=2**-7, atol=0)


@pytest.mark.usefixtures("short_blocks")
@pytest.mark.parametrize("asked", [{}, {"window": 5}, {"softcap": 1.5, "sinks": True}])
def test_dropout_is_the_same_in_the_backward(asked: dict[str, Any]) -> None:
    torch.manual_seed(0)
    tensors = heads(2, 1, 1, length=10, dims=(2,), batch=1)
    asked = dict(asked)
    if asked.pop("sinks", False):
        tensors.append(torch.randn(2, dtype=torch.float64, requires_grad=True))

    def attend_seeded(*given: Tensor) -> Tensor:
        torch.manual_seed(7)
        spec = AttentionSpec(0.5, **{**asked, "dropout": 0.4})
        return attend(*given[:3], spec, *given[3:]).transpose(1, 2)

    # Along one direction, because attention is differentiated once.
    direction = [torch.randn_like(tensor) for tensor in tensors]
    weights = torch.randn_like(tensors[2].expand(-1, 2, -1, -1))
    grads = torch.autograd.grad((attend_seeded(*tensors) * weights).sum(), tensors)
    slope = sum((grad * along).sum() for grad, along in zip(grads, direction, strict=True))
    step = 1e-5
    after, before = (
        (attend_seeded(*(x + sign * step * along for x, along in zip(tensors, direction, strict=True))) * weights).sum()
        for sign in (1, -1)
    )
    # Central differences are off by about step ** 2.
    torch.testing.assert_close(slope, (after - before) / (2 * step), rtol=1e-7, atol=1e-8)


def test_dropout_drops_its_share_of_each_block() -> None:
    # All scores are equal and all values 1: an output is the number of kept keys, scaled by 1 / (keys * kept share).
    length = 300
    query, value = torch.zeros(1, 4, length, 8), torch.ones(1, 4, length, 8)
    spec = AttentionSpec(1.0, dropout=0.25)
    outputs = [attend(query, query, value, spec)[..., 0].transpose(1, 2) for _ in range(2)]
    kept = outputs[0] * torch.arange(1, length + 1) * 0.75
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=1e-3)
    # Half of the keys of 4 * 300 queries, 180600 draws: a standard deviation is 0.1 %.
    assert kept.sum() / (4 * length * (length + 1) / 2) == pytest.approx(0.75, abs=0.005)
    assert not torch.equal(*outputs)
    assert not torch.equal(outputs[0][0, 0], outputs[0][0, 1])


def peak_bytes(length: int, documents: int, query_heads: int, **asked: Any) -> int:
    """Of forward and backward, with one key/value head."""
    torch.manual_seed(0)
    dims = asked.pop("dims", (8, 8, 8))
    tensors = heads(query_heads, 1, 1, length=length, dims=dims, batch=1, dtype=torch.float32)
    sinks = torch.randn(query_heads, requires_grad=True) if asked.pop("sinks", False) else None
    starts = None if documents == 1 else [list(range(0, length, length // documents))]
    with LiveMemory() as memory:
        attend(*tensors, AttentionSpec(0.3, **asked), sinks, starts).sum().backward()
    return memory.peak


@pytest.mark.parametrize(
    ("length", "documents", "query_heads", "asked"),
    [
        (65536, 64, 1, {}),
        (1024, 1, 2, {}),
        (1024, 1, 2, {"dims": (12, 12, 8)}),
        (8192, 64, 2, {"window": 64}),
        (8192, 1, 1, {"window": 1024}),
        (8192, 1, 2, {"window": 128, "sinks": True}),
        (2048, 1, 2, {"sinks": True}),
        (4096, 16, 2, {"softcap": 2.0}),
        (2048, 1, 1, {"softcap": 2.0}),
        (1024, 1, 1, {"dropout": 0.1}),
    ],
    ids=str,
)
def test_memory_is_linear_in_the_length(length: int, documents: int, query_heads: int, asked: dict[str, Any]) -> None:
    short = peak_bytes(length, documents, query_heads, **asked)
    double = peak_bytes(2 * length, documents if documents == 1 else 2 * documents, query_heads, **asked)
    assert double <= 2.1 * short


def test_documents_share_a_windows_mask() -> None:
    # One mask has 256 KiB, 64 of them twice what else there is.
    assert peak_bytes(16384, 64, 2, window=128) <= 1.2 * peak_bytes(16384, 1, 2, window=128)


@pytest.mark.parametrize("asked", [{}, {"sliding_window": 5}, {"softcap": 1.5}], ids=str)
def test_under_autocast_all_is_in_its_dtype(asked: dict[str, Any]) -> None:
    # A rotary embedding leaves query and key in fp32 where the projections are in bf16.
    torch.manual_seed(0)
    query, key, value = heads(4, 2, 2, length=12, dtype=torch.float32)
    arguments = {"attention_mask": None, "ulysses": UlyssesContext(None, "sdpa", None), **asked}
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = ulysses_attention(nn.Identity(), query, key, value.bfloat16(), **arguments)
    grads = torch.autograd.grad(output.float().square().sum(), (query, key, value))
    expected, _ = ulysses_attention(nn.Identity(), query.bfloat16(), key.bfloat16(), value.bfloat16(), **arguments)
    expected_grads = torch.autograd.grad(expected.float().square().sum(), (query, key, value))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close([output, *grads], [expected, *expected_grads], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"ulysses": None}, "outside the forward of a patched decoder"),
        ({"attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask of its own"),
        ({"is_causal": False}, "is not causal"),
        ({"position_bias": torch.zeros(1, 2, 4, 4)}, "hands position_bias to its attention function"),
        ({"cu_seq_lens_q": torch.tensor([0, 4])}, "hands cu_seq_lens_q to its attention function"),
        ({"picks": torch.zeros(1, 4, 2)}, "hands picks to its attention function"),
        ({"attention_mask": SlidingWindow(3), "sliding_window": 4}, "sliding_window=4, but its mask has a window of 3"),
        ({"attention_mask": SlidingWindow(0)}, "a sliding window of 0"),
        ({"key": torch.zeros(1, 2, 8, 8)}, "attends from 4 tokens to 8"),
        ({"key": torch.zeros(1, 2, 4, 8).half()}, r"torch.float32, torch.float16, torch.float32: they must have one"),
    ],
)
def test_what_a_layer_may_not_ask_for(arguments: dict[str, Any], says: str) -> None:
    allowed = {name: torch.zeros(1, 2, 4, 8) for name in ("query", "key", "value")}
    allowed |= {"attention_mask": None, "ulysses": UlyssesContext(None, "sdpa", None)}
    with pytest.raises(ValueError, match=says):
        ulysses_attention(nn.Identity(), **(allowed | arguments))


def test_what_changes_nothing_is_allowed() -> None:
    tensor = torch.randn(1, 2, 4, 8)
    context = UlyssesContext(None, "sdpa", None)
    asked = {"position_ids": torch.arange(4)[None], "is_causal": None, "sliding_window": 0, "use_cache": False}
    output, weights = ulysses_attention(nn.Identity(), tensor, tensor, tensor, None, ulysses=context, **asked)
    torch.testing.assert_close(output, dense_attention(tensor, tensor, tensor, scaling=8**-0.5))
    assert weights is None


def test_a_module_that_is_not_causal_is_refused() -> None:
    module, tensor = nn.Identity(), torch.zeros(1, 2, 4, 8)
    module.is_causal = False
    with pytest.raises(ValueError, match="is not causal"):
        ulysses_attention(module, tensor, tensor, tensor, None, ulysses=UlyssesContext(None, "sdpa", None))

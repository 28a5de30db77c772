"""Attention over shards, heads in groups: exact for any heads, and only one group's gathered tensors are alive."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from dense_attention import dense_attention, heads

from mst_ds.attention import AttentionSpec, CausalAttention, Documents
from mst_ds.geometry import HeadLayout
from mst_ds.layer_stream import LayerStream, StreamedLayer
from mst_ds.memory.live import LiveMemory
from mst_ds.recompute import HostStore
from mst_ds.sequence_parallel import run_simulated, sequence_attention
from mst_ds.sequence_parallel.carried_keys import CarriedKeys
from mst_ds.sequence_parallel.head_exchange import HeadExchange
from mst_ds.sequence_parallel.sequence_attention import SequenceAttention
from mst_ds.token_layout import TokenLayout

LENGTH, SCALING = 36, 0.3
# Both rows have other documents; shards of 18 or 12 meet inside of documents.
STARTS = [[0, 7, 25], [0, 31]]


class Layer(torch.nn.Module):
    """Of queries, keys and values, (B, L, heads, D) each."""

    def __init__(self, attention, stream, sinks):
        super().__init__()
        self.attention, self.stream, self.sinks = attention, stream, sinks

    def forward(self, *tensors):
        return self.attention(*(t.transpose(1, 2) for t in tensors), self.sinks, stream=self.stream) * 1


def on_shards(tensors, sinks, grad_output, sp_size, head_groups, make_stream=None, starts=None, window=None):
    """Output and gradients of the whole sequence; each rank has a `make_stream()` of its own, None means none."""
    heads_of_ranks = HeadLayout(tensors[0].shape[1], tensors[1].shape[1], sp_size, head_groups)
    layout = TokenLayout(sp_size, 1 if make_stream is None else make_stream().chunks)

    def run(group):
        whole = CausalAttention("sdpa", Documents(starts)), AttentionSpec(SCALING, window=window)
        part = [layout.split(t.detach(), dim=2)[group.rank].clone().requires_grad_() for t in tensors]
        own_sinks = None if sinks is None else torch.nn.Parameter(sinks.detach().clone())
        attention = SequenceAttention(*whole, HeadExchange(None if sp_size == 1 else group, heads_of_ranks))
        if make_stream is None:
            output = attention(*part, own_sinks)
        else:
            stream = make_stream()
            output = StreamedLayer(stream, Layer(attention, stream, own_sinks))(*(t.transpose(1, 2) for t in part))
        output.backward(layout.split(grad_output, dim=1)[group.rank])
        return [output.detach(), *(t.grad for t in part)], None if sinks is None else own_sinks.grad

    results = run_simulated(run, sp_size)
    found = [
        layout.join(parts, dim=dim)
        for dim, parts in zip((1, 2, 2, 2), zip(*(r[0] for r in results), strict=True), strict=True)
    ]
    return found if sinks is None else [*found, sum(r[1] for r in results)]


def on_the_whole(tensors, sinks, grad_output, starts=None, window=None):
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, *([] if sinks is None else [sinks]))]
    given = leaves[3] if sinks is not None else None
    output = dense_attention(*leaves[:3], scaling=SCALING, sinks=given, starts=starts, window=window)
    output.backward(grad_output)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_exact(found, expected):
    # fp64, sums in another order.
    for actual, wanted in zip(found, expected, strict=True):
        assert actual.shape == wanted.shape
        assert (actual - wanted).norm() <= 1e-13 * wanted.norm()


def case(num_heads, num_key_value_heads, dims=(8,), sinks=False):
    torch.manual_seed(0)
    tensors = heads(num_heads, num_key_value_heads, num_key_value_heads, length=LENGTH, dims=dims)
    grad_output = torch.randn(2, LENGTH, num_heads, dims[-1], dtype=torch.float64)
    return tensors, torch.randn(num_heads, dtype=torch.float64) if sinks else None, grad_output


# Ranges that begin inside of a key/value head's queries, fewer key/value heads than ranks or groups, one head a group.
@pytest.mark.parametrize("head_groups", [1, 2, 3])
@pytest.mark.parametrize("sp_size", [2, 3])
@pytest.mark.parametrize("counts", [(9, 3), (9, 9), (6, 1), (7, 7), (8, 4)], ids=str)
def test_any_heads(counts, sp_size, head_groups):
    given = case(*counts)
    assert_exact(on_shards(*given, sp_size, head_groups), on_the_whole(*given))


KINDS = {
    "documents": {"starts": STARTS},
    "window": {"window": 5},
    "window and documents": {"window": 5, "starts": STARTS},
}


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_groups", [1, 3])
def test_any_attention(head_groups, kind, sinks):
    given = case(9, 3, sinks=sinks)
    assert_exact(on_shards(*given, 2, head_groups, **KINDS[kind]), on_the_whole(*given, **KINDS[kind]))


def test_values_of_another_width():
    given = case(9, 3, dims=(8, 8, 4))
    assert_exact(on_shards(*given, 2, 3), on_the_whole(*given))


# One chunk; three, whose borders are inside documents.
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("offload", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
@pytest.mark.parametrize(("sp_size", "head_groups"), [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_in_a_layer_that_is_computed_again(kind, sp_size, head_groups, keep, offload, chunks):
    # Sinks where there is no window; every kind has them once in the tests above.
    given = case(9, 3, sinks=kind == "documents")

    def make_stream():
        return LayerStream(chunks=chunks, keep_attention=keep, store=HostStore() if offload else None)

    found = on_shards(*given, sp_size, head_groups, make_stream, **KINDS[kind])
    assert_exact(found, on_the_whole(*given, **KINDS[kind]))


class CountedKeys(CarriedKeys):
    most = 0

    def put(self, chunk, key, value):
        super().put(chunk, key, value)
        CountedKeys.most = max(CountedKeys.most, len(self._blocks))


# Nine chunks of 4 tokens: of the chunk before a token or all, of one more a token, of all before.
@pytest.mark.parametrize(("window", "most"), [(2, 2), (5, 2), (6, 3), (34, 9)])
@pytest.mark.parametrize("keep", [False, True], ids=["again", "kept"])
def test_of_a_window_s_layer_only_the_window_s_keys_are_held(window, most, keep, monkeypatch):
    monkeypatch.setattr(sequence_attention, "CarriedKeys", CountedKeys)
    monkeypatch.setattr(CountedKeys, "most", 0)
    given = case(9, 3)
    found = on_shards(*given, 1, 1, lambda: LayerStream(chunks=9, keep_attention=keep), window=window)
    assert CountedKeys.most == most
    assert_exact(found, on_the_whole(*given, window=window))


def peaks(head_groups, sp_size=2, num_heads=8, length=256, dim=16):
    """Of a forward and of a backward of rank 0, in units of one of its shards of the queries."""
    unit = num_heads * length // sp_size * dim * 4
    whole = CausalAttention("sdpa"), AttentionSpec(SCALING)
    attention_of = HeadLayout(num_heads, num_heads, sp_size, head_groups)

    def run(group):
        leaves = [torch.randn(1, num_heads, length // sp_size, dim, requires_grad=True) for _ in range(3)]
        grad_output = torch.randn(1, length // sp_size, num_heads, dim)
        # The meter is this thread's own; the other rank's tensors it does not see.
        memory = LiveMemory()
        with memory if group.rank == 0 else nullcontext():
            output = SequenceAttention(*whole, HeadExchange(group, attention_of))(*leaves)
            group.all_gather(torch.zeros(()))  # a simulated group holds what was exchanged last
            forward, kept = memory.peak, memory.live
            memory.reset_peak()
            output.backward(grad_output)
        return forward / unit, kept / unit, memory.peak / unit

    return run_simulated(run, sp_size)[0]


def test_gathered_tensors_of_one_group_are_alive():
    forward, kept, backward = peaks(head_groups=1)
    # The output, and the log-sum-exp: one number for each 16 of the output.
    assert kept == pytest.approx(1 + 1 / 16, rel=0.01)
    for head_groups in (2, 4):
        of_forward, of_kept, of_backward = peaks(head_groups)
        assert of_kept == pytest.approx(kept, rel=0.01)
        # Beside what is kept all is gathered, sent or received for one group; a simulated group also holds what the
        # group of heads before sent last, its output.
        assert of_forward - kept <= (forward - kept + 1) / head_groups * 1.01
        # In the backward the three gradients of the shard are there as well.
        assert of_backward - kept - 3 <= (backward - kept - 3) / head_groups * 1.01

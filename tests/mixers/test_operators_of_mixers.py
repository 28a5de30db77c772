"""Convolutions and scans on shards and packed documents, against each document alone in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from mst_ds.attention import Documents
from mst_ds.layer_stream import LayerCall, Pass
from mst_ds.layer_stream.last_output import LastOutput
from mst_ds.mixers import METHODS, OPERATORS, MixedSequence, lightning_attention
from mst_ds.recompute import DeviceStore
from mst_ds.sequence_parallel import SequenceGroup, run_simulated

# Sums of a few float64 numbers, in another order.
TOLERANCE = 1e-12
LENGTH = 12
ONE_EACH = None
# Across the borders of shards of 6, 4, 3 and 2 tokens, on them, of one token, and two shards long.
PACKED = [[0, 1, 4, 5, 11], [0, 6]]
SAME_IN_ALL_ROWS = [[0, 5]]
Call = Callable[..., Any]


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def decay(*shape: int) -> Tensor:
    """In log space."""
    return -torch.rand(shape, dtype=torch.float64)


def causal_conv1d_fn(hidden_states: Tensor, weight: Tensor, bias: Any = None, activation: Any = None) -> Tensor:
    taps, length = weight.shape[-1], hidden_states.shape[-1]
    padded = torch.nn.functional.pad(hidden_states, (taps - 1, 0))
    windows = [padded[:, :, tap : tap + length] * weight[:, tap, None] for tap in range(taps)]
    total = torch.stack(windows).sum(dim=0) + bias[:, None]
    return torch.tanh(total) if activation == "tanh" else total


def torch_chunk_gated_delta_rule(query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor) -> Any:
    repeats = value.shape[2] // key.shape[2]
    query, key = (tensor.repeat_interleave(repeats, dim=2) for tensor in (query, key))
    state = value.new_zeros(value.shape[0], value.shape[2], key.shape[3], value.shape[3])
    outputs = []
    for token in range(value.shape[1]):
        state = state * g[:, token].exp()[..., None, None]
        change = beta[:, token, :, None] * (value[:, token] - (state * key[:, token, :, :, None]).sum(dim=2))
        state = state + key[:, token, :, :, None] * change[:, :, None]
        outputs.append((state * query[:, token, :, :, None]).sum(dim=2))
    return torch.stack(outputs, dim=1), state


def mamba2_chunk_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int, D: Tensor, dt_bias: Tensor
) -> Tensor:
    assert chunk_size == 7
    repeats = dt.shape[2] // B.shape[2]
    B, C = (tensor.repeat_interleave(repeats, dim=2) for tensor in (B, C))
    step = torch.nn.functional.softplus(dt + dt_bias)
    state: Any = 0.0
    outputs = []
    for token in range(dt.shape[1]):
        change = (step[:, token, :, None] * hidden_states[:, token])[..., None] * B[:, token, :, None]
        state = state * (A * step[:, token]).exp()[..., None, None] + change
        outputs.append((state * C[:, token, :, None]).sum(dim=3) + D[:, None] * hidden_states[:, token])
    return torch.stack(outputs, dim=1)


def mamba_selective_scan(
    hidden_states: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, z: Tensor, delta_bias: Tensor
) -> Tensor:
    step = torch.nn.functional.softplus(dt + delta_bias[:, None])
    state: Any = 0.0
    outputs = []
    for token in range(dt.shape[2]):
        change = (step * hidden_states)[:, :, token, None] * B[:, None, :, token]
        state = state * (A * step[:, :, token, None]).exp() + change
        outputs.append((state * C[:, None, :, token]).sum(dim=2))
    return (torch.stack(outputs, dim=2) + D[:, None] * hidden_states) * torch.sigmoid(z)


def _rnn_scan(hidden_states: Tensor, *, recurrent_gate: Tensor, reset: Tensor, recurrent_states: Any) -> Any:
    assert not reset.any()
    state: Any = 0.0 if recurrent_states is None else recurrent_states
    outputs = []
    for token in range(hidden_states.shape[1]):
        state = state * recurrent_gate[:, token] + hidden_states[:, token]
        outputs.append(state)
    return torch.stack(outputs, dim=1), state


def linear_attention(query: Tensor, key: Tensor, value: Tensor, slope: Tensor) -> Tensor:
    state: Any = 0.0
    outputs = []
    for token in range(query.shape[1]):
        state = state * torch.exp(-slope) + key[:, token, :, :, None] * value[:, token, :, None]
        outputs.append((query[:, token, :, :, None] * state).sum(dim=2))
    return torch.stack(outputs, dim=1)


def in_blocks(sequence: MixedSequence, original: Call, *tokens: Tensor, slope: Tensor) -> Tensor:
    """Decays of blocks of 3 tokens, as transformers' layers have them, from the slopes."""
    place = torch.arange(3, dtype=torch.float64)
    distance = place[:, None] - place
    diagonal = torch.where(distance >= 0, torch.exp(-slope * distance), 0.0)
    query_decay, key_decay = torch.exp(-slope * (place[:, None] + 1)), torch.exp(-slope * (2 - place[:, None]))
    return lightning_attention(sequence, *tokens, slope, query_decay, key_decay, diagonal)


def recurrence(channels: int) -> tuple[dict[str, Any], list[str]]:
    tokens = {"hidden_states": normal(2, LENGTH, channels), "recurrent_gate": torch.rand(2, LENGTH, channels).double()}
    return tokens, list(tokens)


def lightning(heads: int) -> tuple[dict[str, Tensor], list[str]]:
    tokens = {name: normal(2, LENGTH, heads, 2) for name in ("query", "key", "value")}
    return tokens | {"slope": torch.rand(heads, 1, 1, dtype=torch.float64)}, list(tokens)


def delta_rule(heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], list[str]]:
    tokens = {
        "query": normal(2, LENGTH, key_heads, 3),
        "key": normal(2, LENGTH, key_heads, 3) / 3,
        "value": normal(2, LENGTH, heads, 2),
        "g": decay(2, LENGTH, heads),
        "beta": torch.rand(2, LENGTH, heads, dtype=torch.float64).to(dtype),
    }
    return tokens, list(tokens)


def mamba_2(heads: int, groups: int) -> tuple[dict[str, Tensor], list[str]]:
    tokens = {
        "hidden_states": normal(2, LENGTH, heads, 3),
        "dt": normal(2, LENGTH, heads),
        "B": normal(2, LENGTH, groups, 2),
        "C": normal(2, LENGTH, groups, 2),
    }
    return tokens | {"A": decay(heads), "D": normal(heads), "dt_bias": normal(heads)}, list(tokens)


def mamba_1(channels: int) -> tuple[dict[str, Tensor], list[str]]:
    tokens = {name: normal(2, channels, LENGTH) for name in ("hidden_states", "dt", "z")}
    tokens |= {name: normal(2, 3, LENGTH) for name in ("B", "C")}
    return tokens | {"A": decay(channels, 3), "D": normal(channels), "delta_bias": normal(channels)}, list(tokens)


def short_convolution(taps: int = 4) -> tuple[dict[str, Tensor], list[str]]:
    return {"hidden_states": normal(2, 3, LENGTH), "weight": normal(3, taps), "bias": normal(3)}, ["hidden_states"]


def positional(operator: Call, given: Mapping[str, Any]) -> Tensor:
    """Called as transformers' layers do, the first arguments without a name."""
    first = ("hidden_states", "dt", "A", "B", "C", "query", "key", "value", "weight", "bias")
    names = [name for name in first if name in given]
    output = operator(*(given[name] for name in names), **{name: given[name] for name in given if name not in names})
    if isinstance(output, tuple):
        output, _ = output
    assert isinstance(output, Tensor)
    return output


def alone(original: Call, given: Mapping[str, Any], names: list[str], dim: int, starts: Any) -> Tensor:
    """Each document of each row by itself."""
    rows = []
    for row in range(2):
        of_row = [0] if starts is None else starts[row % len(starts)]
        parts = []
        for start, stop in zip(of_row, [*of_row[1:], LENGTH], strict=True):
            document = {name: given[name][row : row + 1].narrow(dim, start, stop - start) for name in names}
            parts.append(positional(original, {**given, **document}))
        rows.append(torch.cat(parts, dim=dim))
    return torch.cat(rows)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE if expected.dtype == torch.float64 else torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


FROM_NOTHING = {"reset": torch.tensor(False), "recurrent_states": None}
CALLED_BY_NAME = {**OPERATORS, **METHODS, "linear_attention": in_blocks}
CASES: dict[str, tuple[Call, Any, int, dict[str, Any], list[int]]] = {
    "convolution": (causal_conv1d_fn, short_convolution, 2, {"activation": "tanh"}, [1, 2, 6]),
    "convolution of a token": (causal_conv1d_fn, lambda: short_convolution(1), 2, {}, [2]),
    "delta rule": (torch_chunk_gated_delta_rule, lambda: delta_rule(4, 2), 1, {}, [1, 2, 4]),
    # 2 heads of 3, then 1; a key head read on both ranks.
    "delta rule, uneven heads": (torch_chunk_gated_delta_rule, lambda: delta_rule(3, 1), 1, {}, [2, 3]),
    # Of 6 heads a rank has 3, which read one key head and half of another.
    "delta rule, uneven groups": (torch_chunk_gated_delta_rule, lambda: delta_rule(6, 3), 1, {}, [2]),
    "delta rule, two dtypes": (
        torch_chunk_gated_delta_rule,
        lambda: delta_rule(2, 2, torch.float32),
        1,
        {},
        [2],
    ),
    "Mamba 2": (mamba2_chunk_scan, lambda: mamba_2(4, 2), 1, {"chunk_size": 7}, [1, 2, 4]),
    "RG-LRU": (_rnn_scan, lambda: recurrence(4), 1, FROM_NOTHING, [1, 2, 3]),
    "lightning attention": (linear_attention, lambda: lightning(3), 1, {}, [1, 2, 3]),
    "Mamba 1": (mamba_selective_scan, lambda: mamba_1(3), 2, {}, [1, 2, 3]),
}


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, (*_, sizes) in CASES.items() for size in sizes], ids=str
)
@pytest.mark.parametrize("starts", [ONE_EACH, PACKED, SAME_IN_ALL_ROWS], ids=["one each", "packed", "alike"])
def test_values_and_gradients_are_those_of_each_document_alone(name: str, size: int, starts: Any) -> None:
    original, make, dim, settings, _ = CASES[name]
    torch.manual_seed(0)
    given, names = make()
    leaves = {key: tensor.requires_grad_() for key, tensor in given.items()}
    expected = alone(original, leaves | settings, names, dim, starts)
    weights = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, list(leaves.values()), weights)
    length = LENGTH // size

    def rank(group: SequenceGroup) -> tuple[Tensor, list[Tensor]]:
        def own(key: str, tensor: Tensor) -> Tensor:
            return tensor.narrow(dim, group.rank * length, length) if key in names else tensor

        mine = {key: own(key, tensor).detach().requires_grad_() for key, tensor in leaves.items()}
        sequence = MixedSequence(None if size == 1 else group, Documents(starts))
        operator = CALLED_BY_NAME[original.__name__]
        output = positional(lambda *args, **kwargs: operator(sequence, original, *args, **kwargs), mine | settings)
        of_output = weights.narrow(dim, group.rank * length, length)
        return output.detach(), list(torch.autograd.grad(output, list(mine.values()), of_output))

    ranks = run_simulated(rank, size)
    assert_close(torch.cat([output for output, _ in ranks], dim=dim), expected)
    for key, expected_grad, *grads in zip(leaves, expected_grads, *(grads for _, grads in ranks), strict=True):
        assert_close(torch.cat(grads, dim=dim) if key in names else torch.stack(grads).sum(dim=0), expected_grad)


@pytest.mark.parametrize("starts", [ONE_EACH, [[0, 5], [0, 3]], [[0, 3], [0, 5, 9]], [[0, 5, 9]]], ids=str)
def test_a_state_goes_on_into_the_next_chunk_where_a_rows_document_does(starts: Any) -> None:
    given, names = recurrence(4)
    call = LayerCall([slice(0, 5), slice(5, 9), slice(9, LENGTH)], DeviceStore(), LastOutput(), is_kept=False)
    outputs = []
    for index, tokens in enumerate(call.chunks):
        call.begin(index, Pass.FORWARD)
        of_chunk = {name: tensor[:, tokens] for name, tensor in given.items()}
        sequence = MixedSequence(None, Documents(starts), call)
        outputs.append(METHODS["_rnn_scan"](sequence, _rnn_scan, **of_chunk, **FROM_NOTHING)[0])
    assert_close(torch.cat(outputs, dim=1), alone(_rnn_scan, given | FROM_NOTHING, names, 1, starts))


def test_more_ranks_than_heads_are_refused() -> None:
    def rank(group: SequenceGroup) -> None:
        given, _ = delta_rule(2, 2)
        sequence = MixedSequence(group, Documents())
        OPERATORS["torch_chunk_gated_delta_rule"](sequence, torch_chunk_gated_delta_rule, **given)

    with pytest.raises(ValueError, match=r"sp_size is 3, and .* has 2 heads to divide; allowed: at most 2"):
        run_simulated(rank, 3)

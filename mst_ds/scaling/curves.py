"""Which results belong to one curve, and how well they scale along it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from mst_ds.geometry import shard_length
from mst_ds.scaling.result import DONE, Result
from mst_ds.scaling.sweep import short_length


@dataclass(frozen=True)
class Curve:
    """Results of more and more ranks.

    Efficiency is counted in model FLOPs, so that a longer sequence, whose tokens cost more, is not taken for a slower
    one: FLOP/s of a rank against those of a rank in the smallest world.

    Attributes:
        group: variant, and whether it is predicted.
        label: tells the curves of a group apart.
    """

    group: str
    label: str
    results: tuple[Result, ...]

    @property
    def is_measured(self) -> bool:
        return self.results[0].is_measured

    @property
    def efficiencies(self) -> tuple[float, ...]:
        rates = [_flops_rate(result) / result.world_size for result in self.results]
        return tuple(rate / rates[0] for rate in rates)

    @property
    def speedups(self) -> tuple[float, ...]:
        """FLOP/s against those of the smallest world."""
        rates = [_flops_rate(result) for result in self.results]
        return tuple(rate / rates[0] for rate in rates)


def strong_curves(results: Iterable[Result]) -> list[Curve]:
    """The same step on more ranks: length and tokens of a step stay."""
    return _curves(
        results,
        lambda result: (result.source, result.variant, result.seq_len, result.tokens_per_step),
        lambda result: f"{short_length(result.seq_len)}, {_sequences(result)} a step",
    )


def weak_curves(results: Iterable[Result]) -> list[Curve]:
    """As much for each rank on more ranks: more sequences of one length, or longer ones in shards of one length."""
    results = list(results)
    more = _curves(
        results,
        lambda result: (result.source, result.variant, result.sp_size, result.seq_len, _tokens_of_rank(result)),
        lambda result: f"more sequences of {short_length(result.seq_len)}, sp {result.sp_size}",
    )
    longer = _curves(
        results,
        lambda result: (
            result.source,
            result.variant,
            result.dp_size,
            result.seq_len / result.sp_size,
            _tokens_of_rank(result),
        ),
        lambda result: (
            f"longer, {short_length(shard_length(result.seq_len, result.sp_size))} a rank, {_sequences(result)} a step"
        ),
    )
    return more + longer


def _curves(
    results: Iterable[Result], key: Callable[[Result], tuple[Any, ...]], label: Callable[[Result], str]
) -> list[Curve]:
    """Those of at least two worlds; where several results have the same world, the fastest of them."""
    groups: dict[tuple[Any, ...], dict[int, Result]] = {}
    for result in results:
        if result.status != DONE or not result.tokens_per_second or not result.flops_per_token:
            continue
        group = groups.setdefault(key(result), {})
        other = group.get(result.world_size)
        if other is None or _flops_rate(other) < _flops_rate(result):
            group[result.world_size] = result
    curves = []
    for group in groups.values():
        if len(group) > 1:
            first = group[min(group)]
            curves.append(Curve(_group(first), label(first), tuple(group[size] for size in sorted(group))))
    return curves


def _group(result: Result) -> str:
    return result.variant if result.is_measured else f"{result.variant}, {result.source}"


def _sequences(result: Result) -> str:
    count = (result.tokens_per_step or 0) // result.seq_len
    return f"{count} sequence{'s' * (count > 1)}"


def _flops_rate(result: Result) -> float:
    return (result.tokens_per_second or 0.0) * (result.flops_per_token or 0.0)


def _tokens_of_rank(result: Result) -> float:
    return (result.tokens_per_step or 0) / result.world_size

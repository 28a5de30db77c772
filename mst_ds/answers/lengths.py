"""Answers for several lengths, a row each, and for a mix of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mst_ds.answers.answer import Answer
from mst_ds.answers.verdict import Cost, cost_of_mix, hours_text, seconds_text
from mst_ds.config import GIB, parse_seq_len

_SHARES_WITHIN = 1e-6
# So many columns fit into 80 of a terminal with no more than a space between them.
_MANY = 10


@dataclass(frozen=True)
class Lengths:
    """Lengths that were asked for, and of a mix the part of all tokens that each has."""

    seq_lens: tuple[int, ...]
    shares: tuple[float, ...] | None


def parse_lengths(words: Sequence[str]) -> Lengths:
    """Reads "512K" "1M", or the mix "8K:0.9" "128K:0.1".

    Raises:
        ValueError: no lengths, or shares that are missing or do not sum to 1.
    """
    parts = [word.partition(":") for word in words]
    seq_lens = tuple(parse_seq_len(length) for length, _, _ in parts)
    if not any(colon for _, colon, _ in parts):
        return Lengths(seq_lens, None)
    given = " ".join(words)
    shares = []
    for _, colon, share in parts:
        try:
            shares.append(float(share))
        except ValueError:
            missing = "has no share of tokens" if not colon else f"has the share {share!r}"
            raise ValueError(
                f"seq_len is {given!r}, of which one {missing}; allowed: shares such as 8K:0.9 128K:0.1"
            ) from None
    # Of a share that is no number the sum is none, either.
    if not all(share > 0 for share in shares) or not abs(sum(shares) - 1) <= _SHARES_WITHIN:
        raise ValueError(
            f"seq_len is {given!r}, whose shares sum to {sum(shares):g}; allowed: shares > 0 that sum to 1"
        )
    return Lengths(seq_lens, tuple(shares))


def mix_cost(answers: Sequence[Answer], shares: Sequence[float]) -> Cost | None:
    """Of a run whose tokens are of these lengths; None where times are not known."""
    costs = [answer.cost for answer in answers]
    known = [cost for cost in costs if cost is not None]
    return cost_of_mix(known, list(shares), answers[0].run.tokens) if len(known) == len(costs) else None


def lengths_table(answers: Sequence[Answer], shares: Sequence[float] | None) -> Table:
    """A table for rich: whether each length fits and what limits it, and what a run of it takes. Memory in GiB: of a
    device, and of a node's host."""
    has_price = answers[0].run.price_per_gpu_hour is not None
    columns = ["tokens", *["share"] * (shares is not None), "fits", "limit", "device", "host", "s/step", "tokens/s"]
    columns += ["hours", "GPU-h", *["price"] * has_price]
    table = narrow_table(columns)
    for index, answer in enumerate(answers):
        plan, cost = answer.plan, answer.cost
        ranks = min(answer.request.work.ranks_per_node, plan.topology.world_size)
        row = [str(answer.seq_len), *([f"{shares[index]:g}"] if shares is not None else [])]
        row += ["yes" if plan.fits else "no", answer.limit.place]
        row += [f"{plan.peak_bytes / GIB:.1f}", f"{ranks * plan.host_bytes / GIB:.1f}"]
        if cost is None or plan.predicted_step_seconds is None:
            row += ["-"] * (4 + has_price)
        else:
            row += [seconds_text(plan.predicted_step_seconds), f"{cost.tokens_per_second:,.0f}"]
            row += [hours_text(cost.hours), hours_text(cost.gpu_hours), *([f"{cost.price:,.2f}"] if has_price else [])]
        table.add_row(*row)
    return table


def narrow_table(columns: Sequence[str]) -> Table:
    """One whose rows stay on a line of 80 columns, or nearly."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, int(len(columns) < _MANY), 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True, justify="left" if name in ("fits", "limit", "offload") else "right")
    return table


def mix_as_dict(answers: Sequence[Answer], shares: Sequence[float]) -> dict[str, Any]:
    """As JSON has it: the mix, and its lengths as any answer."""
    cost = mix_cost(answers, shares)
    return {
        "fits": all(answer.plan.fits for answer in answers),
        "cost": None if cost is None else cost.as_dict(),
        "lengths": [{"share": share, **answer.as_dict()} for share, answer in zip(shares, answers, strict=True)],
    }

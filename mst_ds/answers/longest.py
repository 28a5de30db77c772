"""The longest sequences that fit, by nodes and by ranks to a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from mst_ds.answers import variants
from mst_ds.answers.answer import why_nothing_fits
from mst_ds.planner.plan import LENGTH_STEP, longest_of_request
from mst_ds.planner.request import Request


@dataclass(frozen=True)
class Longest:
    """Of so many nodes with so many ranks to a sequence; of several sequences of a sample the length is of one.

    reason: why no length fits; None where one does.
    """

    num_nodes: int
    sp_size: int
    seq_len: int
    reason: str | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found = {"num_nodes": self.num_nodes, "sp_size": self.sp_size, "max_seq_len": self.seq_len}
        return found if self.reason is None else {**found, "reason": self.reason}


def longest_of_ranks(request_of: Callable[[int, int], Request], ranks: Iterable[tuple[int, int]]) -> list[Longest]:
    """Of each number of nodes and ranks to a sequence. Left out is what a run refuses.

    Args:
        request_of: makes the request of these two.

    Raises:
        ValueError: all are refused; as the last one is.
    """
    found, refusals = [], []
    for num_nodes, sp_size in ranks:
        try:
            request = request_of(num_nodes, sp_size)
        except ValueError as error:
            refusals.append(error)
        else:
            found.append(_longest(request))
    if not found:
        raise refusals[-1]
    return found


def _longest(request: Request) -> Longest:
    longest = longest_of_request(request) // request.sequences_per_sample
    reason = None if longest else why_nothing_fits(request)
    return Longest(variants.nodes_of(request), request.work.sp_size, longest, reason)


def longest_table(found: Sequence[Longest]) -> Table:
    """A table for rich: a row for each number of nodes, a column for each number of ranks to a sequence."""
    sp_sizes = sorted({each.sp_size for each in found})
    table = Table("nodes", *(f"sp {sp_size}" for sp_size in sp_sizes), title="longest sequence that fits, in K tokens")
    lengths = {(each.num_nodes, each.sp_size): f"{each.seq_len // LENGTH_STEP}" for each in found}
    for num_nodes in sorted({each.num_nodes for each in found}):
        table.add_row(str(num_nodes), *(lengths.get((num_nodes, sp_size), "-") for sp_size in sp_sizes))
    return table

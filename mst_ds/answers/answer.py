"""The answer to a request: whether it fits and what limits it, what a run of it takes, and what to change."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

from mst_ds.answers.advice import Change, changes_that_fit, changes_that_help
from mst_ds.answers.verdict import DEFAULT_TOKENS, Cost, Limit, cost_of, cost_of_reference, limit_of
from mst_ds.config import GIB
from mst_ds.gpus import AS_PREDICTED
from mst_ds.model_shape import unknown_positions
from mst_ds.planner.plan import LENGTH_STEP, longest_of_request, plan_of_request
from mst_ds.planner.request import Request
from mst_ds.planner.sequence_ranks import settle_sp_size
from mst_ds.planner.types import Plan


@dataclass(frozen=True)
class Run:
    """What a run is asked for beside its length: tokens over all ranks, what an hour of a GPU costs, and whether they
    go through the model that the run starts from before the first step."""

    tokens: int = DEFAULT_TOKENS
    price_per_gpu_hour: float | None = None
    has_reference: bool = False


@dataclass(frozen=True)
class Answer:
    """What is planned, its plan, the longest length that fits, and what makes this one fit, or faster or cheaper.

    Of several sequences of a sample the longest length, and those of changes, are of one.
    """

    request: Request
    plan: Plan
    longest: int
    changes: tuple[Change, ...] = ()
    run: Run = field(default_factory=Run)

    @property
    def seq_len(self) -> int:
        """Of one sequence of a sample."""
        return self.plan.seq_len // self.request.sequences_per_sample

    @cached_property
    def limit(self) -> Limit:
        return limit_of(self.plan, ranks_per_node=self.request.work.ranks_per_node)

    @property
    def cost(self) -> Cost | None:
        return cost_of(self.plan, self.run.tokens, self.run.price_per_gpu_hour)

    @property
    def reference(self) -> Cost | None:
        """Of the pass through the model that the run starts from, where the objective needs it."""
        if self.cost is None or not self.run.has_reference:
            return None
        work = self.request.work.with_settings(**asdict(self.plan.settings))
        return cost_of_reference(self.cost, work, self.request.rates)

    @property
    def trust(self) -> str | None:
        """How far times are to be trusted: docs/planning.md has what they were held against. None where there are
        none."""
        gpu = self.request.rates
        if self.cost is None:
            return None
        if gpu.attained == AS_PREDICTED:
            return "times are predicted, to about 30%; --calibrate RUN takes them from a run"
        return f"times are by a run, which attained {gpu.attained} of what is predicted for its {gpu.name}"

    @property
    def warning(self) -> str | None:
        return unknown_positions(self.request.work.shape, self.seq_len)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, with the plan's own fields."""
        plan, cost = self.plan, self.cost
        return {
            "fits": plan.fits,
            "limit": {
                "place": self.limit.place,
                "phase": self.limit.phase,
                "needed_bytes": self.limit.needed,
                "there_bytes": self.limit.there,
            },
            "peak_bytes": plan.peak_bytes,
            "peak_phase": plan.peak_phase.name,
            "host_bytes": plan.host_bytes,
            "max_seq_len": self.longest,
            "cost": None if cost is None else cost.as_dict(),
            "reference": None if self.reference is None else self.reference.as_dict(),
            "trust": self.trust,
            "warnings": [] if self.warning is None else [self.warning],
            "changes_that_fit": [] if plan.fits else [change.as_dict() for change in self.changes],
            "changes_that_help": [change.as_dict() for change in self.changes] if plan.fits else [],
            **plan.as_dict(),
        }


def answer_request(
    request: Request,
    run: Run | None = None,
    *,
    is_longest: bool = False,
    longest: int | None = None,
    has_changes: bool = True,
) -> Answer:
    """Plans it.

    Args:
        is_longest: in place of its length, for the longest that fits.
        longest: the longest that fits, where it is known, which any length of the request has alike.
        has_changes: whether to look for changes.

    Raises:
        ValueError: the model's states alone do not fit, with what to change; or the model has fewer positions.
    """
    longest = longest_of_request(request) if longest is None else longest
    if is_longest and longest:
        request = request.with_length(longest)
    asked, request = request, settle_sp_size(request)
    plan = plan_of_request(request)
    changes: tuple[Change, ...] = ()
    if has_changes:
        # What makes it fit may be another length, with any ranks to a sequence.
        changes = changes_that_help(request, plan) if plan.fits else changes_that_fit(asked)
    per_sample = request.sequences_per_sample
    changes = tuple(_per_sequence(change, per_sample) for change in changes)
    require_states(plan, changes)
    return Answer(request, plan, longest // per_sample, changes, run or Run())


def require_states(plan: Plan, changes: tuple[Change, ...]) -> None:
    """Refuse what no length would make fit.

    Raises:
        ValueError: in one line with what would.
    """
    states = plan.phases[0]
    if states.device_bytes > plan.device_memory:
        allowed = [str(change) for change in changes] or ["a higher ZeRO stage, more ranks, offload, or more memory"]
        raise ValueError(
            f"the model states of a rank and the reserve take {states.device_bytes / GIB:.1f} GiB, more than the "
            f"{plan.device_memory / GIB:.1f} GiB of its device; allowed: {', or '.join(allowed)}"
        )


def why_nothing_fits(request: Request) -> str:
    """Of a request that no length fits: the limit of the shortest."""
    plan = plan_of_request(request.with_length(LENGTH_STEP), has_choices=False)
    limit = limit_of(plan, ranks_per_node=request.work.ranks_per_node)
    return f"not even {LENGTH_STEP} tokens fit: {limit}"


def _per_sequence(change: Change, per_sample: int) -> Change:
    """Its length as the flag has it, where a sample has several sequences."""
    settings = dict(change.settings)
    if isinstance(settings.get("seq_len"), int):
        settings["seq_len"] = int(settings["seq_len"]) // per_sample
    return replace(change, settings=tuple(settings.items()))

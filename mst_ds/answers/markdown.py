"""An answer as a page of Markdown, with every term and its formula."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mst_ds.answers.answer import Answer
from mst_ds.answers.report import advice_lines, answer_lines
from mst_ds.answers.verdict import seconds_text
from mst_ds.config import GIB
from mst_ds.planner.types import MemoryTerm, Plan


def markdown_report(answer: Answer, *, model: str, lines: Sequence[str]) -> str:
    """The page.

    Args:
        model: its name.
        lines: commands that run the plan.
    """
    plan = answer.plan
    first, *rest = answer_lines(answer)
    parts = [
        f"# {model}: {answer.seq_len} tokens on {plan.topology.world_size} ranks",
        f"**{first}**",
        *rest,
        f"Settings: {plan.settings}; ZeRO-{plan.zero_stage}, {plan.dtype}, micro-batch {plan.micro_batch_size}, "
        f"{plan.gradient_accumulation_steps} a step.",
        "## Memory of a rank",
        _phases(plan),
        "## Choices",
        "Each against its opposite, or against one group or one chunk.",
        _choices(plan),
        "## Advice",
        "\n".join(f"- {line.strip()}" for line in advice_lines(answer)),
        "## To run it",
        "\n".join(["```bash", *lines, "```"]),
        "## Terms",
        *(part for phase in plan.phases for part in (f"### {phase.name}", _terms(phase.terms))),
    ]
    return "\n\n".join(parts) + "\n"


def _phases(plan: Plan) -> str:
    rows = [(phase.name, _gib(phase.device_bytes), _gib(phase.host_bytes)) for phase in plan.phases]
    there = ("there is", _gib(plan.device_memory), "?" if plan.host_memory is None else _gib(plan.host_memory))
    return _table(("phase", "device, GiB", "host, GiB"), [*rows, there])


def _choices(plan: Plan) -> str:
    rows = [
        (
            choice.setting,
            str(choice.value).lower(),
            f"{choice.device_bytes / GIB:+.3f}",
            f"{choice.host_bytes / GIB:+.3f}",
            "" if choice.seconds is None else seconds_text(choice.seconds, sign="+"),
        )
        for choice in plan.choices
    ]
    return _table(("setting", "value", "device, GiB", "host, GiB", "s a step"), rows)


def _terms(terms: Iterable[MemoryTerm]) -> str:
    rows = [(term.name, term.place, term.kind, _gib(term.bytes), term.formula) for term in terms]
    return _table(("term", "place", "kind", "GiB", "formula"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _gib(count: int) -> str:
    return f"{count / GIB:.3f}"

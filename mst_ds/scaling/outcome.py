"""What a launch of the training command came to: from its exit code, its log and its metrics."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mst_ds.command_line.exit_protocol import EXITS_BY_SIGKILL, said_errors
from mst_ds.scaling.result import DONE, FAILED, OUT_OF_MEMORY, REFUSED, TIMED_OUT

# Our own words, torch's for GPUs and CPUs, numpy's, Python's, SLURM's.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|can't allocate memory|Unable to allocate|MemoryError",
    re.IGNORECASE,
)
_NO_WORD = "a rank ended without a word, as one does that the system kills when the host's memory is full"


@dataclass(frozen=True)
class Outcome:
    """`error` is one line; `died_silently` says that a rank was killed, which may have nothing to do with the point."""

    status: str
    error: str | None = None
    died_silently: bool = False


def judge(exit_code: int | None, log: str, *, has_begun: bool, limit_minutes: float) -> Outcome:
    """What a launch came to.

    Args:
        exit_code: the launcher's; None where the time was over.
        log: all that the ranks and the launcher wrote.
        has_begun: whether there are metrics, which a run that is refused does not come to.
    """
    if exit_code == 0:
        return Outcome(DONE)
    errors = said_errors(log)
    own = [error for error in errors if not error.is_consequence]
    if exit_code is None:
        # What a rank said before tells more than that the others went on waiting.
        return Outcome(TIMED_OUT, f"not done after {limit_minutes:g} minutes" + (f"; {own[0].text}" if own else ""))
    of_memory = [error for error in own if _OUT_OF_MEMORY.search(error.text)]
    if of_memory:
        return Outcome(OUT_OF_MEMORY, of_memory[0].text)
    if own:
        # Not by the exit code: srun gives that of the ranks that it kills when the first ends.
        is_refused = not has_begun and not own[0].is_of_one_rank
        return Outcome(REFUSED if is_refused else FAILED, own[0].text)
    of_system = [line.strip() for line in log.splitlines() if "oom_kill" in line]
    if of_system:
        return Outcome(OUT_OF_MEMORY, of_system[0])
    # The launchers' exit codes differ: a rank that was killed, or one that saw it, may be the first they notice.
    if errors or exit_code in EXITS_BY_SIGKILL:
        return Outcome(FAILED, _NO_WORD, died_silently=True)
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), "nothing was said")
    return Outcome(FAILED, f"exit code {exit_code}: {last}")


def read_metrics(path: Path) -> dict[str, Any]:
    """What `metrics.jsonl` says, as fields of `Result`; nothing where there is no such file."""
    if not path.is_file():
        return {}
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:  # the last line of a process that was killed
            break
    steps = [record for record in records if "loss" in record]
    fields: dict[str, Any] = {"steps": len(steps)}
    for record in records:
        if "measured_bytes" in record:
            fields |= {name: record[name] for name in ("planned_bytes", "measured_bytes")}
    if steps:
        fields |= {"loss": steps[-1]["loss"], "tokens_per_step": steps[-1]["tokens"]}
    if len(steps) > 1:
        fields["tokens_per_second"] = median(step["tokens_per_second"] for step in steps[1:])
        fields["step_seconds"] = median(step["seconds"] for step in steps[1:])
    return fields


def read_environment(path: Path) -> dict[str, str]:
    """What `summary.json` says of where the run was; nothing where there is no such file."""
    if not path.is_file():
        return {}
    summary = json.loads(path.read_text(encoding="utf-8"))
    return {"device": summary["device"], **summary["versions"]}

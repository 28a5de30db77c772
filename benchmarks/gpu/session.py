"""Measures on one GPU, within minutes, all that is claimed of one.

Ten sections, each with a deadline; after each the results are written, so that what is measured stays. docs/gpu.md says
what they mean. Without a GPU the same code runs at small sizes.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.gpu import exactness, kernel_times, lengths, machine, offload, packed, phases, probes, speed
from benchmarks.gpu.scale import GPU, TINY
from benchmarks.gpu.sections import Context, Outcome, Section, run_sections
from benchmarks.report import write_json

SECTIONS = (
    Section("device", 25, machine.run, machine.KEYS, machine.lines),
    Section("probes", 40, probes.run, probes.KEYS, probes.lines),
    Section("exactness", 45, exactness.run, exactness.KEYS, exactness.lines),
    Section("memory", 75, phases.run, phases.KEYS, phases.lines),
    Section("speed", 110, speed.run, speed.KEYS, speed.lines),
    Section("long step", 75, speed.run_long, speed.KEYS, speed.lines),
    Section("longest", 70, lengths.run, lengths.KEYS, lengths.lines),
    Section("packed", 25, packed.run, packed.KEYS, packed.lines),
    Section("offload", 25, offload.run, offload.KEYS, offload.lines),
    Section("profile", 30, kernel_times.run, kernel_times.KEYS, kernel_times.lines),
)
BUDGET_SECONDS = 560.0
# After the budget: a kernel that does not come back is not interrupted by a deadline.
_GRACE_SECONDS = 20.0
_TABLE_WIDTH = 140  # columns where it is not for a terminal


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's flags."""
    names = [section.name for section in SECTIONS]
    folder = Path(os.environ.get("OUT") or ".")
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_session.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=folder / "gpu_session.json", help="JSON file; default: in $OUT, else here."
    )
    parser.add_argument("--sections", nargs="+", choices=names, default=names)
    parser.add_argument("--budget_seconds", type=float, default=BUDGET_SECONDS, help="Of all sections together.")
    parser.add_argument("--tiny", action="store_true", help="Small sizes; always so on a CPU.")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Outcome]:
    """Runs the sections and prints a table; what became of each, by name."""
    options = parse_options(argv)
    console = Console(width=None if sys.stdout.isatty() else _TABLE_WIDTH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        console.print("No GPU here: small sizes on the CPU (--tiny), which say nothing of a GPU.")
        options.tiny = True
    sections = [section for section in SECTIONS if section.name in options.sections]
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    start = time.monotonic()

    def write(outcomes: Mapping[str, Outcome]) -> None:
        content = {"sections": {name: asdict(outcome) for name, outcome in outcomes.items()}}
        write_json(options.output, device, settings, content)
        name, outcome = list(outcomes.items())[-1]
        console.print(f"{time.monotonic() - start:6.1f} s  {name}: {outcome.status}", highlight=False)

    faulthandler.dump_traceback_later(options.budget_seconds + _GRACE_SECONDS, exit=True)
    try:
        context = Context(device, TINY if options.tiny else GPU)
        outcomes = run_sections(sections, context, options.budget_seconds, write)
    finally:
        faulthandler.cancel_dump_traceback_later()
    console.print(_table(sections, outcomes))
    console.print(f"written: {options.output}")
    return outcomes


def _table(sections: Sequence[Section], outcomes: Mapping[str, Outcome]) -> Table:
    table = Table("section", "status", "seconds", "what was found", title="On a GPU", show_lines=True)
    for section in sections:
        outcome = outcomes[section.name]
        found = section.lines(outcome.results) if outcome.results else []
        error = [] if outcome.error is None else [outcome.error.splitlines()[-1]]
        table.add_row(section.name, outcome.status, f"{outcome.seconds:.1f}", "\n".join([*found, *error]))
    return table

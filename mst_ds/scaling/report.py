"""The results of a sweep as people and spreadsheets read them: results.csv, report.md and its plots."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from filelock import FileLock

from mst_ds.config import GIB
from mst_ds.files.whole_file import replace_file
from mst_ds.scaling.curves import Curve, strong_curves, weak_curves
from mst_ds.scaling.plot import plot_results
from mst_ds.scaling.result import DONE, STATUSES, Result, read_results
from mst_ds.scaling.sweep import short_length

_COLUMNS = (
    "name",
    "source",
    "status",
    "num_nodes",
    "num_gpus",
    "world_size",
    "sp_size",
    "dp_size",
    "seq_len",
    "variant",
    "steps",
    "tokens_per_second",
    "step_seconds",
    "tokens_per_step",
    "flops_per_token",
    "planned_peak_bytes",
    "measured_peak_bytes",
    "loss",
    "attempts",
    "device",
    "error",
)


def write_report(output_dir: Path) -> list[Result]:
    """Writes everything from the points' result files alone; returns the results.

    Raises:
        ValueError: a result file is none of ours.
    """
    # Tasks of a job array end together; the last one to get the lock sees all results.
    with FileLock(output_dir / "report.lock"):
        results = read_results(output_dir)
        replace_file(output_dir / "results.csv", as_csv(results))
        plots = plot_results(results, output_dir / "plots")
        replace_file(output_dir / "report.md", as_markdown(results, [path.relative_to(output_dir) for path in plots]))
    return results


def as_csv(results: Iterable[Result]) -> str:
    """A line for each result; what is not known is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows([getattr(result, column) for column in _COLUMNS] for result in results)
    return text.getvalue()


def as_markdown(results: Sequence[Result], plots: Sequence[Path]) -> str:
    """`plots`: pictures, relative to the report."""
    sections = [f"# Scaling experiments\n\n{_summary(results)}"]
    sections += [f"![{path.stem.replace('_', ' ')}]({path.as_posix()})" for path in plots]
    if results and not plots:
        sections.append("Plots need matplotlib: `pip install 'mst_ds[plots]'`.")
    sections += _against_length(results)
    sections += _scaling("Strong scaling: the same step on more ranks", strong_curves(results))
    sections += _scaling("Weak scaling: as much for each rank on more ranks", weak_curves(results))
    sections += _planned_against_measured(results)
    sections += _not_done(results)
    return "\n\n".join(sections) + "\n"


def _summary(results: Sequence[Result]) -> str:
    counts = Counter(result.status for result in results if result.is_measured)
    text = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status]) or "none"
    predicted = sum(not result.is_measured for result in results)
    lines = [f"Points that ran: {text}." + (f" Predicted: {predicted}." if predicted else "")]
    # More than one where the points of a folder do not compare.
    environments = Counter(tuple(result.environment.items()) for result in results if result.environment)
    for environment, count in environments.items():
        versions = ", ".join(f"{name} {value}" for name, value in environment if name != "device")
        lines.append(f"Measured on {dict(environment)['device']}, with {versions}: {count}.")
    return "\n\n".join(lines)


def _against_length(results: Sequence[Result]) -> list[str]:
    groups: dict[tuple[str, str, int, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.source, result.variant, result.num_nodes, result.num_gpus), []).append(result)
    # Where nothing is done there is nothing to compare.
    groups = {key: group for key, group in groups.items() if any(result.status == DONE for result in group)}
    sections = ["## Against length"] if groups else []
    for (source, variant, num_nodes, num_gpus), group in groups.items():
        of = f"{variant}, {num_nodes} × {num_gpus} ranks{'' if group[0].is_measured else f', {source}'}"
        sections.append(f"### {of}\n\n{_by_length('tokens/s', group, _rate)}\n\n{_by_length('GiB', group, _memory)}")
    return sections


def _by_length(unit: str, group: Sequence[Result], cell: Callable[[Result], str]) -> str:
    sp_sizes = sorted({result.sp_size for result in group})
    cells = {(result.seq_len, result.sp_size): cell(result) for result in group}
    rows = [
        [short_length(seq_len), *(cells.get((seq_len, sp_size), "") for sp_size in sp_sizes)]
        for seq_len in sorted({result.seq_len for result in group})
    ]
    return _table([f"length ({unit})", *(f"sp {sp_size}" for sp_size in sp_sizes)], rows)


def _rate(result: Result) -> str:
    return result.status if result.tokens_per_second is None else f"{result.tokens_per_second:,.0f}"


def _memory(result: Result) -> str:
    """At the peak; of a point that is not done what was planned or measured is not what it took."""
    peak = result.peak_bytes
    return result.status if peak is None or result.status != DONE else _gib(peak)


def _scaling(title: str, curves: Sequence[Curve]) -> list[str]:
    rows = []
    for curve in curves:
        for result, speedup, efficiency in zip(curve.results, curve.speedups, curve.efficiencies, strict=True):
            sizes = [str(result.world_size), f"{result.sp_size}", short_length(result.seq_len)]
            rows.append([curve.group, curve.label, *sizes, _rate(result), f"{speedup:.2f}", f"{efficiency:.0%}"])
    if not rows:
        return []
    header = ["variant", "curve", "ranks", "sp", "length", "tokens/s", "speed-up", "efficiency"]
    return [f"## {title}\n\nBoth in model FLOPs, against the fewest ranks.\n\n{_table(header, rows)}"]


def _planned_against_measured(results: Sequence[Result]) -> list[str]:
    """A row for each point: at the measured peak, and the phase that exceeds its plan most."""
    rows = []
    for result in results:
        planned, measured = result.planned_bytes, result.measured_bytes
        if not measured or not all(planned.values()):
            continue
        difference = {phase: count / planned[phase] - 1 for phase, count in measured.items()}
        peak, worst = max(measured, key=lambda name: measured[name]), max(difference, key=lambda name: difference[name])
        numbers = [_gib(planned[peak]), _gib(measured[peak]), f"{difference[peak]:+.1%}"]
        rows.append([result.name, peak, *numbers, f"{worst} {difference[worst]:+.1%}"])
    if not rows:
        return []
    header = ["point", "phase at the peak", "planned GiB", "measured GiB", "difference", "most above its plan"]
    return [f"## Planned against measured memory\n\n{_table(header, rows)}"]


def _not_done(results: Sequence[Result]) -> list[str]:
    rows = [[result.name, result.source, result.status, result.error or ""] for result in results]
    rows = [row for row, result in zip(rows, results, strict=True) if result.status != DONE]
    return [f"## Not done\n\n{_table(['point', 'source', 'status', 'why'], rows)}"] if rows else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # A bar would end a cell.
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _gib(count: int) -> str:
    return f"{count / GIB:.3f}"

"""What a preflight found as people read it."""

from __future__ import annotations

from rich.table import Table

from mst_ds.preflight.check import Check, Report


def report_table(report: Report) -> Table:
    """A table for rich: each case with its errors, and what they mean."""
    table = Table(title=_subject(report), title_justify="left")
    table.add_column("settings", max_width=36)
    table.add_column("loss", justify="right", no_wrap=True)
    table.add_column("worst gradient", justify="right", no_wrap=True)
    table.add_column("result")
    for check in report.checks:
        style = None if check.is_exact else "bold"
        table.add_row(
            str(check.case), _error(check.loss_error), _error(check.gradient_error), _result(check), style=style
        )
    return table


def _subject(report: Report) -> str:
    subject = (
        f"{report.model} with {report.parameters:,} parameters in {report.layers} layers, against transformers' own, "
        "in float64"
    )
    if report.switched_off:
        subject += f" (without {', '.join(report.switched_off)})"
    return subject


def _error(error: float | None) -> str:
    return "" if error is None else f"{error:.1e}"


def _result(check: Check) -> str:
    if check.refusal is not None:
        return f"refused: {check.refusal}"
    return "exact" if check.defect is None else f"differs: {check.defect}"

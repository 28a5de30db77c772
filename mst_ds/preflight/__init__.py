"""Finds out whether a model of the user's architecture trains exactly, before a run: small, in float64, on the CPU."""

from mst_ds.preflight.cases import Case, cases_to_try
from mst_ds.preflight.check import Check, Report, check_model, require_exact
from mst_ds.preflight.on_text import require_same_on_text
from mst_ds.preflight.report import report_table

__all__ = [
    "Case",
    "Check",
    "Report",
    "cases_to_try",
    "check_model",
    "report_table",
    "require_exact",
    "require_same_on_text",
]

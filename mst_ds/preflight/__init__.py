"""Finds out whether a model of the user's architecture trains exactly, before a run: small, in float64, on the CPU."""

from mst_ds.preflight.check import Check, Report, check_model, require_exact
from mst_ds.preflight.report import report_table
from mst_ds.preflight.settings import Setting, settings_to_try

__all__ = ["Check", "Report", "Setting", "check_model", "report_table", "require_exact", "settings_to_try"]

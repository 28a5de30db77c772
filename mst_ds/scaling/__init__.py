"""Scaling experiments: a sweep of launches over sizes and variants, their results, and what these show."""

from mst_ds.scaling.launchers import Interrupted, Launcher, launcher_here
from mst_ds.scaling.predict import predict_sweep
from mst_ds.scaling.report import write_report
from mst_ds.scaling.result import Result, read_results
from mst_ds.scaling.runner import check_results, run_point
from mst_ds.scaling.sweep import Point, Sweep, Variant
from mst_ds.scaling.sweep_file import read_sweep

__all__ = [
    "Interrupted",
    "Launcher",
    "Point",
    "Result",
    "Sweep",
    "Variant",
    "check_results",
    "launcher_here",
    "predict_sweep",
    "read_results",
    "read_sweep",
    "run_point",
    "write_report",
]

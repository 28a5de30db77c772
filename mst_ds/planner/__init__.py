"""The plan of a rank, from the DeepSpeed JSON, the model's config and the rank's memory: pure arithmetic."""

from mst_ds.planner.gpus import gpu_memory
from mst_ds.planner.plan import DEFAULT_RESERVE, LENGTH_STEP, longest_seq_len, make_plan
from mst_ds.planner.plot import plot_plan
from mst_ds.planner.report import plan_table
from mst_ds.planner.types import Choice, MemoryTerm, Phase, Plan

__all__ = [
    "DEFAULT_RESERVE",
    "LENGTH_STEP",
    "Choice",
    "MemoryTerm",
    "Phase",
    "Plan",
    "gpu_memory",
    "longest_seq_len",
    "make_plan",
    "plan_table",
    "plot_plan",
]

"""The plan of a rank, from the DeepSpeed JSON, the model's config and the rank's memory: pure arithmetic."""

from mst_ds.planner.plan import make_plan
from mst_ds.planner.report import plan_table
from mst_ds.planner.types import Choice, MemoryTerm, Phase, Plan

__all__ = ["Choice", "MemoryTerm", "Phase", "Plan", "make_plan", "plan_table"]

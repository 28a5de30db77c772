"""The plan of a rank, from the DeepSpeed JSON, the model's config and the rank's memory: pure arithmetic."""

from mst_ds.gpus import Gpu, gpu_by_name, gpu_of_device
from mst_ds.planner.plan import (
    DEFAULT_RESERVE,
    LENGTH_STEP,
    longest_of_request,
    longest_seq_len,
    make_plan,
    plan_of_request,
)
from mst_ds.planner.request import Request, make_request, read_request
from mst_ds.planner.sequence_ranks import settle_sp_size
from mst_ds.planner.types import Choice, MemoryTerm, Phase, Plan

__all__ = [
    "DEFAULT_RESERVE",
    "LENGTH_STEP",
    "Choice",
    "Gpu",
    "MemoryTerm",
    "Phase",
    "Plan",
    "Request",
    "gpu_by_name",
    "gpu_of_device",
    "longest_of_request",
    "longest_seq_len",
    "make_plan",
    "make_request",
    "plan_of_request",
    "read_request",
    "settle_sp_size",
]

"""The plan of a rank, from the DeepSpeed JSON, the model's config and the rank's memory: pure arithmetic."""

from mst_ds.gpus import Gpu, gpu_by_name, gpu_of_device
from mst_ds.planner.advice import Change, changes_that_fit, changes_that_help
from mst_ds.planner.answer import Answer, Run, answer_request, require_states, why_nothing_fits
from mst_ds.planner.compare import compare, comparison_table
from mst_ds.planner.lengths import Lengths, lengths_table, mix_as_dict, mix_cost, parse_lengths
from mst_ds.planner.markdown import markdown_report
from mst_ds.planner.plan import (
    DEFAULT_RESERVE,
    LENGTH_STEP,
    longest_of_request,
    longest_seq_len,
    make_plan,
    plan_of_request,
)
from mst_ds.planner.plot import plot_plan
from mst_ds.planner.rates_file import gpu_of_file
from mst_ds.planner.report import advice_lines, answer_lines, plan_table, positions
from mst_ds.planner.request import Request, make_request, read_request
from mst_ds.planner.sequence_ranks import settle_sp_size
from mst_ds.planner.types import Choice, MemoryTerm, Phase, Plan
from mst_ds.planner.verdict import Cost, Limit, limit_of
from mst_ds.planner.written import launch_lines, write_config, written_config

__all__ = [
    "DEFAULT_RESERVE",
    "LENGTH_STEP",
    "Answer",
    "Change",
    "Choice",
    "Cost",
    "Gpu",
    "Lengths",
    "Limit",
    "MemoryTerm",
    "Phase",
    "Plan",
    "Request",
    "Run",
    "advice_lines",
    "answer_lines",
    "answer_request",
    "changes_that_fit",
    "changes_that_help",
    "compare",
    "comparison_table",
    "gpu_by_name",
    "gpu_of_device",
    "gpu_of_file",
    "launch_lines",
    "lengths_table",
    "limit_of",
    "longest_of_request",
    "longest_seq_len",
    "make_plan",
    "make_request",
    "markdown_report",
    "mix_as_dict",
    "mix_cost",
    "parse_lengths",
    "plan_of_request",
    "plan_table",
    "plot_plan",
    "positions",
    "read_request",
    "require_states",
    "settle_sp_size",
    "why_nothing_fits",
    "write_config",
    "written_config",
]

"""What people are told who ask for a plan: whether it fits, what limits it, what a run of it takes, what to change."""

from mst_ds.answers.advice import Change, changes_that_fit, changes_that_help
from mst_ds.answers.answer import Answer, Run, answer_request, require_states, why_nothing_fits
from mst_ds.answers.compare import compare, comparison_table
from mst_ds.answers.lengths import Lengths, lengths_table, mix_as_dict, mix_cost, parse_lengths
from mst_ds.answers.longest import Longest, longest_of_ranks, longest_table
from mst_ds.answers.markdown import markdown_report
from mst_ds.answers.plot import plot_plan
from mst_ds.answers.rates_file import gpu_of_file
from mst_ds.answers.report import advice_lines, answer_lines, plan_table, positions
from mst_ds.answers.verdict import Cost, Limit, limit_of
from mst_ds.answers.written import launch_lines, write_config, written_config

__all__ = [
    "Answer",
    "Change",
    "Cost",
    "Lengths",
    "Limit",
    "Longest",
    "Run",
    "advice_lines",
    "answer_lines",
    "answer_request",
    "changes_that_fit",
    "changes_that_help",
    "compare",
    "comparison_table",
    "gpu_of_file",
    "launch_lines",
    "lengths_table",
    "limit_of",
    "longest_of_ranks",
    "longest_table",
    "markdown_report",
    "mix_as_dict",
    "mix_cost",
    "parse_lengths",
    "plan_table",
    "plot_plan",
    "positions",
    "require_states",
    "why_nothing_fits",
    "write_config",
    "written_config",
]

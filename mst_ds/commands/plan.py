"""What fits, before anything runs: mst-plan --model ... --num_gpus 8 --gpu H100 --seq_len 1M

Needs neither weights nor a GPU. The exit code is 0 if the plan fits, 1 if it does not, 2 (and one line on stderr) for a
request that cannot be planned.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import sys
from collections.abc import Sequence

from mst_ds.answers import (
    Answer,
    Lengths,
    Run,
    advice_lines,
    answer_lines,
    answer_request,
    compare,
    comparison_table,
    launch_lines,
    lengths_table,
    longest_of_ranks,
    longest_table,
    markdown_report,
    mix_as_dict,
    mix_cost,
    parse_lengths,
    plan_table,
    plot_plan,
    positions,
    require_states,
    write_config,
)
from mst_ds.command_line.entry_point import REQUEST_ERRORS, console, refuse, run_command
from mst_ds.commands import plan_flags
from mst_ds.config import GIB
from mst_ds.files.read_file import expanded
from mst_ds.files.whole_file import replace_file
from mst_ds.model_shape import load_config_of_shape, load_model_shape
from mst_ds.planner import LENGTH_STEP, Request, longest_of_request, plan_of_request
from mst_ds.topology import divisors
from mst_ds.zero import ds_config_file


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    try:
        options = plan_flags.parser(__doc__).parse_args(argv)
        plan_flags.check(options)
        if options.table:
            return _print_table(options)
        lengths = None if options.seq_len is None else parse_lengths(options.seq_len)
        if options.compare and lengths is not None:
            return _print_comparison(options, lengths)
        if lengths is not None and len(options.seq_len) > 1:
            return _print_lengths(options, lengths)
        return _print_answer(options, lengths)
    except REQUEST_ERRORS as error:
        return refuse("mst-plan", error)


def _print_answer(options: argparse.Namespace, lengths: Lengths | None) -> int:
    seq_len = LENGTH_STEP if lengths is None else lengths.seq_lens[0]
    answer = answer_request(_request(options, seq_len), _run(options), is_longest=lengths is None)
    made = _write_files(options, answer)
    if options.json:
        traced = _trace(options, answer)
        found = answer.as_dict() | ({"launch": list(made)} if made else {}) | ({"trace": traced} if traced else {})
        print(json.dumps(found, indent=2))
        return 0 if answer.plan.fits else 1
    print("\n".join(answer_lines(answer)))
    if answer.request.sequences_per_sample > 1:
        print(f"a sample has two answers: {answer.plan.seq_len} tokens")
    console().print(plan_table(answer.plan))
    print("\n".join(advice_lines(answer)))
    for name, kind in (("plot", "picture"), ("report", "report")):
        if getattr(options, name) is not None:
            print(f"{kind}: {getattr(options, name)}")
    if options.write is not None:
        said = f"settings: {options.write}" if answer.plan.fits else "no settings are written: the plan does not fit"
        print("\n".join([said, *made]))
    # A dry run takes its time, and may be refused.
    if traced := _trace(options, answer):
        _print_trace(traced)
    return 0 if answer.plan.fits else 1


def _write_files(options: argparse.Namespace, answer: Answer) -> tuple[str, ...]:
    """What was asked for as files; returns the commands that start a run of the written settings, where they are."""
    plan, gpu = answer.plan, answer.request.rates.name if answer.request.times_are_known else None
    if options.plot is not None:
        plot_plan(plan, expanded(options.plot, "plot"), model=options.model, gpu=gpu)
    is_written = options.write is not None and plan.fits
    ds_config = str(options.write) if is_written else options.ds_config
    lines = launch_lines(
        answer.request,
        plan,
        model=options.model,
        ds_config=ds_config,
        train=plan_flags.train_config(options),
    )
    if is_written:
        path = expanded(options.write, "write")
        if path.exists() and path.samefile(ds_config_file(options.ds_config)):
            raise ValueError(f"write is {str(path)!r}, which is the ds_config that is planned; allowed: another file")
        write_config(path, plan_flags.ds_config_of(options.ds_config), plan)
    if options.report is not None:
        page = markdown_report(answer, model=options.model, lines=lines)
        replace_file(expanded(options.report, "report"), page)
    return lines if is_written else ()


def _print_comparison(options: argparse.Namespace, lengths: Lengths) -> int:
    request = _request(options, lengths.seq_lens[0])
    rows = compare(request, None if options.sp_size is None else [request.work.sp_size])
    if not rows:
        require_states(plan_of_request(request), ())
    if options.json:
        print(json.dumps([row.as_dict() for row in rows], indent=2))
    else:
        console().print(comparison_table(rows, ranks_per_node=options.num_gpus))
    return 0 if rows[0].plan.fits else 1


def _print_lengths(options: argparse.Namespace, lengths: Lengths) -> int:
    requests = [_request(options, seq_len) for seq_len in lengths.seq_lens]
    longest = longest_of_request(requests[0])
    run = _run(options)
    answers = [answer_request(request, run, longest=longest, has_changes=False) for request in requests]
    if options.json:
        found = [answer.as_dict() for answer in answers]
        shares = lengths.shares
        print(json.dumps(found if shares is None else mix_as_dict(answers, shares), indent=2))
    else:
        console().print(lengths_table(answers, lengths.shares))
        if lengths.shares is not None:
            cost = mix_cost(answers, lengths.shares)
            print("no time is predicted" if cost is None else f"mix: {cost.tokens_per_second:,.0f} tokens/s; {cost}")
    return 0 if all(answer.plan.fits for answer in answers) else 1


def _request(options: argparse.Namespace, seq_len: int) -> Request:
    # A pair is two sequences.
    seq_len *= plan_flags.train_config(options).sequences_per_sample
    return plan_flags.request_of(options, num_nodes=options.num_nodes, sp_size=options.sp_size, seq_len=seq_len)


def _run(options: argparse.Namespace) -> Run:
    has_reference = plan_flags.train_config(options).has_reference
    return Run(int(options.tokens), options.price_per_gpu_hour, has_reference)


def _trace(options: argparse.Namespace, answer: Answer) -> dict[str, dict[str, int]]:
    """Bytes of activations on the device at the peak of each phase: by the formulas, and on fake tensors; empty where
    nobody asks."""
    if not options.trace:
        return {}
    plan, capability = answer.plan, answer.request.work.capability
    # What the libraries have to say must not mix with the result.
    with contextlib.redirect_stdout(sys.stderr):
        from mst_ds.adapters import requested_config
        from mst_ds.memory.dry_run import dry_run, planned_activations

        peft_config = requested_config(plan_flags.train_config(options).adapters)
        planned = planned_activations(plan)
        measured = dry_run(load_config_of_shape(options.model), plan, peft_config, capability=capability)
    return {name: {"planned_bytes": planned[name], "dry_run_bytes": count} for name, count in measured.items()}


def _print_trace(traced: dict[str, dict[str, int]]) -> None:
    from rich.table import Table

    table = Table("phase", "planned GiB", "dry run GiB", "difference", title="activations on the device")
    for name, found in traced.items():
        planned, measured = found["planned_bytes"], found["dry_run_bytes"]
        table.add_row(name, f"{planned / GIB:.3f}", f"{measured / GIB:.3f}", f"{planned / measured - 1:+.1%}")
    console().print(table)


def _print_table(options: argparse.Namespace) -> int:
    """The longest length for 1, 2, 4 ... nodes and each sp_size; returns the exit code."""
    shape = load_model_shape(options.model)
    counts = sorted({2**power for power in range(options.num_nodes.bit_length())} | {options.num_nodes})
    ranks = [(nodes, size) for nodes in counts for size in divisors(nodes * options.num_gpus)]
    if options.sp_size is not None:
        ranks = [(nodes, options.sp_size) for nodes in counts]

    def request_of(num_nodes: int, sp_size: int) -> Request:
        return plan_flags.request_of(options, num_nodes=num_nodes, sp_size=sp_size, seq_len=LENGTH_STEP)

    found = longest_of_ranks(request_of, ranks)
    if options.json:
        print(json.dumps([each.as_dict() for each in found], indent=2))
    else:
        console().print(longest_table(found))
        if reasons := [each.reason for each in found if each.reason is not None]:
            print(f"0: {reasons[-1]}")
        if known := positions(shape, max(each.seq_len for each in found)):
            print(f"the longest of them{known}")
    return 0 if any(each.seq_len for each in found) else 1


def cli() -> int:
    """The command of a process; returns its exit code."""
    # A search makes some hundred thousand tuples that stay: looking through them for garbage again and again takes a
    # quarter of its time.
    gc.set_threshold(100_000)
    return run_command("mst-plan", main)


if __name__ == "__main__":
    sys.exit(cli())

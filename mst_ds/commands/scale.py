"""Sweep sizes and variants, each point a launch of its own:

mst-scale --sweep laptop.yaml --output_dir runs/scaling

Any flag of mst-train may be given too, with a value, and is one of every point. A point that has a result is not
run again. The exit code is 0 when every point has one, whatever it is; 2, and one line on stderr, for a sweep that
cannot run; 75 where it was stopped, or another process is at a point: the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from mst_ds.command_line.entry_point import REQUEST_ERRORS, refuse, run_command
from mst_ds.command_line.exit_protocol import EXIT_STOPPED
from mst_ds.command_line.flags import OneLineParser
from mst_ds.config import GIB
from mst_ds.files.read_file import expanded
from mst_ds.planner import gpu_by_name
from mst_ds.scaling import (
    Interrupted,
    Result,
    Sweep,
    check_results,
    launcher_here,
    predict_sweep,
    read_sweep,
    run_point,
    write_report,
)
from mst_ds.scaling.sweep_file import train_flags


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sweep", type=Path, help="YAML file, or a shipped one's name; a flag given beside it wins.")
    parser.add_argument("--output_dir", type=Path, help="Folder of the points, results.csv, report.md and plots/.")
    parser.add_argument("--sp_size", type=int, nargs="+", help="Ranks that share a sequence (default: 1).")
    parser.add_argument("--seq_len", nargs="+", help="Tokens in a sequence: 4096 32K 1M.")
    parser.add_argument("--num_nodes", type=int, nargs="+", help="Nodes; more than 1 needs SLURM (default: 1).")
    parser.add_argument("--num_gpus", type=int, nargs="+", help="Ranks of a node, on a CPU too (default: 1).")
    parser.add_argument("--variants", nargs="+", help="Names of the file's variants; default: all of them.")
    parser.add_argument("--time_limit", type=float, help="Minutes for each point (default: 30).")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--point", type=int, help="Run this point alone; the first is 0.")
    instead.add_argument("--count", action="store_true", help="Run nothing, print how many points there are.")
    instead.add_argument("--report", action="store_true", help="Run nothing, write the report of what has a result.")
    instead.add_argument(
        "--predict", action="store_true", help="Run nothing, add what the planner says of each point on --gpu."
    )
    parser.add_argument("--gpu", help="GPU of --predict: H100, H200, A100-80GB ...")
    parser.add_argument("--host_memory_gib", type=float, help="Memory of a node, for --predict; default: not known.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    try:
        options, rest = _parser().parse_known_args(argv)
        flags = train_flags(rest)
        if options.report:
            return _report(_output_dir(options))
        if options.gpu is not None and not options.predict:
            raise ValueError("--gpu is what --predict is for; allowed: both, or neither")
        sizes = ("sp_size", "seq_len", "num_nodes", "num_gpus", "variants", "time_limit")
        sweep = read_sweep(options.sweep, {name: getattr(options, name) for name in sizes}, flags)
        sweep.check()
        if options.count:
            print(len(sweep.points))
            return 0
        output_dir = _output_dir(options)
        if options.predict:
            return _predict(sweep, output_dir, options)
        return _run(sweep, output_dir, options.point)
    except REQUEST_ERRORS as error:
        return refuse("mst-scale", error)


def _output_dir(options: argparse.Namespace) -> Path:
    if options.output_dir is None:
        raise ValueError("no output_dir is given; allowed: --output_dir, the folder that results are in or go to")
    folder = expanded(options.output_dir, "output_dir")
    if options.report and not folder.is_dir():
        raise ValueError(f"output_dir is {str(folder)!r}, but no such folder is here; allowed: that of a sweep")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _run(sweep: Sweep, output_dir: Path, number: int | None) -> int:
    if number is not None and not 0 <= number < len(sweep.points):
        raise ValueError(f"point is {number}; allowed: 0 to {len(sweep.points) - 1}")
    chosen = range(len(sweep.points)) if number is None else [number]
    launcher = launcher_here(sweep)
    launcher.check(sweep.points[index] for index in chosen)
    check_results(sweep, (sweep.points[index] for index in chosen), output_dir)
    elsewhere = 0
    for index in chosen:
        point = sweep.points[index]
        print(f"[{index + 1}/{len(sweep.points)}] {point.name}: ", end="", flush=True)
        try:
            result = run_point(sweep, point, output_dir, launcher)
        except Interrupted as error:
            print(f"{error}; the same command goes on")
            return EXIT_STOPPED
        elsewhere += result is None
        print("another process is at it" if result is None else _describe(result), flush=True)
    _report(output_dir)
    return EXIT_STOPPED if elsewhere else 0


def _predict(sweep: Sweep, output_dir: Path, options: argparse.Namespace) -> int:
    if options.gpu is None:
        raise ValueError("predict needs --gpu, whose memory and rates it is for")
    gib = options.host_memory_gib
    if gib is not None and not 0 < gib < math.inf:
        raise ValueError(f"host_memory_gib is {gib:g}; allowed: a number > 0")
    host_memory = None if gib is None else int(gib * GIB)
    for result in predict_sweep(sweep, output_dir, gpu_by_name(options.gpu), host_memory):
        print(f"{result.name}: {_describe(result)}")
    return _report(output_dir)


def _report(output_dir: Path) -> int:
    results = write_report(output_dir)
    print(f"{len(results)} results: {output_dir / 'report.md'}, {output_dir / 'results.csv'}")
    return 0


def _describe(result: Result) -> str:
    if result.error is not None:
        return f"{result.status}: {result.error}"
    rate = "" if result.tokens_per_second is None else f", {result.tokens_per_second:,.0f} tokens/s"
    memory = "" if result.peak_bytes is None else f", {result.peak_bytes / GIB:.3f} GiB at the peak"
    return f"{result.status}{rate}{memory}"


def cli() -> int:
    """The command of a process; returns its exit code."""
    return run_command("mst-scale", main)


if __name__ == "__main__":
    sys.exit(cli())

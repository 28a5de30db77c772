"""Times a step of each contender, interleaved, on the same weights and data: python -m benchmarks.step

First the gradients of all are compared with those of ordinary recompute. With --longest it finds instead the longest
sequence that each contender can train on: until memory runs out on an accelerator, within --memory_gib on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import CONTENDERS, Work, missing_package
from benchmarks.measure import PARTS, Bench, Part, longest, measure
from benchmarks.report import RESULTS, as_record, as_table, write_json
from benchmarks.sizes import SIZES, Size
from mst_ds.config import GIB, parse_seq_len

_FILE_WIDTH = 180  # columns of a table that is not for a terminal
REFERENCES = ("recompute", "DeepSpeed ALST", "mst_ds, one chunk")


def parse_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "llama-3.2-1b" if torch.cuda.is_available() else "cpu-small"
    parser.add_argument("--size", choices=SIZES, default=default)
    parser.add_argument("--lengths", nargs="+", type=parse_seq_len, help="Tokens: 4096, 16K; default: the size's own.")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7, help="Interleaved rounds, each contender once in each.")
    parser.add_argument("--chunk_length", type=int, default=1024, help="Tokens in a chunk, of MLPs and of the loss.")
    parser.add_argument("--longest", action="store_true", help="Find the longest sequence that each can train on.")
    parser.add_argument("--memory_gib", type=float, default=2.0, help="Activations and gradients on a CPU (--longest).")
    parser.add_argument("--output", type=Path, help="JSON file; default: in benchmarks/results.")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    options = parse_options(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, console = SIZES[options.size], Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    kind = "longest" if options.longest else "step"
    path = options.output or RESULTS / f"{options.size}-{kind}-{device.type}.json"
    if options.longest:
        content: dict[str, Any] = {"longest": _longest(size, options, device, console)}
        write_json(path, device, settings, content)
    else:
        records: list[dict[str, Any]] = []
        for seq_len in options.lengths or size.lengths:
            for part in options.parts:
                records.append(_measure(size, options, device, console, seq_len, part))
                write_json(path, device, settings, {"records": records})  # what is done stays, whatever comes
    console.print(f"written: {path}")


def _work(seq_len: int, options: argparse.Namespace) -> Work:
    chunks = -(-seq_len // options.chunk_length)
    return Work(seq_len, chunks, chunks)


def _measure(
    size: Size, options: argparse.Namespace, device: torch.device, console: Console, seq_len: int, part: Part
) -> dict[str, Any]:
    work = _work(seq_len, options)
    measured = measure(Bench(size, seq_len, device), _installed(options, console), work, part, options.rounds)
    title = f"{options.size}, {part}, {seq_len} tokens, {work.mlp_chunks} chunks"
    console.print(as_table(title, measured.results, seq_len, REFERENCES))
    if measured.out_of_memory:
        console.print(f"out of memory: {', '.join(measured.out_of_memory)}")
    return as_record(measured, part=part, seq_len=seq_len, chunks=work.mlp_chunks)


def _installed(options: argparse.Namespace, console: Console) -> list[str]:
    missing = {name: missing_package(name) for name in options.contenders}
    for name, package in missing.items():
        if package is not None:
            console.print(f"left out: {name}, {package} is not installed")
    return [name for name, package in missing.items() if package is None]


def _longest(size: Size, options: argparse.Namespace, device: torch.device, console: Console) -> dict[str, int]:
    table = Table("contender", "longest", title=f"{options.size}: longest sequence that fits")
    bench, memory = Bench(size, options.chunk_length, device), int(options.memory_gib * GIB)
    lengths = {}
    for name in _installed(options, console):

        def fits(seq_len: int, name: str = name) -> bool:
            return bench.at(seq_len).fits(name, _work(seq_len, options), "step", memory) is not None

        lengths[name] = longest(fits, shortest=options.chunk_length, step=options.chunk_length)
        table.add_row(name, str(lengths[name]))
    console.print(table)
    return lengths


if __name__ == "__main__":
    main()

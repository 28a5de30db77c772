"""What fits, before anything runs: python launch/plan.py --model ... --num_gpus 8 --gpu H100 --seq_len 1M

Needs neither weights nor a GPU. The exit code is 0 if the plan fits, 1 if it does not, 2 (and one line on stderr) for a
request that cannot be planned.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mst_ds.config import DEFAULT_DS_CONFIG, DEFAULT_MODEL, GIB, parse_seq_len
from mst_ds.planner import Plan, gpu_memory, longest_seq_len, make_plan, plan_table, plot_plan


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)  # in one line, where argparse would print the usage as well and exit


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="plan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="Shipped config, Hugging Face id, or folder with a config.json; well-known ids need no network.",
    )
    parser.add_argument("--ds_config", default=DEFAULT_DS_CONFIG, help="DeepSpeed JSON with an optional 'mst' block.")
    parser.add_argument("--num_gpus", type=int, default=1, help="Ranks of a node, each with a GPU (default: 1).")
    parser.add_argument("--num_nodes", type=int, default=1, help="Nodes of the run (default: 1).")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--gpu", help="Name that stands for a GPU's memory: H100, H200, A100-80GB ...")
    memory.add_argument("--device_memory_gib", type=float, help="Memory of a GPU; default: the 'mst' block's.")
    parser.add_argument(
        "--host_memory_gib", type=float, help="Memory of a node, an equal part for each rank; default: not known."
    )
    parser.add_argument("--sp_size", type=int, help="Ranks that share a sequence; default: the 'mst' block's.")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seq_len", help="Tokens in a sequence, over all its shards: 4096, 512K, 1M.")
    length.add_argument("--max_seq_len", action="store_true", help="Plan for the longest sequence that fits.")
    parser.add_argument("--json", action="store_true", help="Print the plan as JSON, with every term and its formula.")
    parser.add_argument("--plot", type=Path, help="Write a picture of the phases to this file, such as plan.png.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        plan, longest = _plan(options)
        if options.plot is not None:
            plot_plan(plan, options.plot)
    except ValueError as error:
        print(f"plan.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(_as_json(plan, longest), indent=2))
    else:
        _print_table(plan, longest)
    return 0 if plan.fits else 1


def _plan(options: argparse.Namespace) -> tuple[Plan, int]:
    """The plan, and the longest length that fits."""
    for name in ("num_gpus", "num_nodes"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; allowed: a whole number >= 1")
    arguments: dict[str, Any] = {
        "world_size": options.num_gpus * options.num_nodes,
        "ranks_per_node": options.num_gpus,
        "device_memory": gpu_memory(options.gpu) if options.gpu else _bytes(options, "device_memory_gib"),
        "host_memory": _bytes(options, "host_memory_gib", ranks=options.num_gpus),
        "sp_size": options.sp_size,
    }
    longest = longest_seq_len(options.model, options.ds_config, **arguments)
    if options.max_seq_len:
        # Where nothing fits the plan for the shortest length shows what is too large.
        seq_len = longest or 1024
    else:
        seq_len = parse_seq_len(options.seq_len)
    return make_plan(options.model, options.ds_config, seq_len=seq_len, **arguments), longest


def _bytes(options: argparse.Namespace, name: str, *, ranks: int = 1) -> int | None:
    gib = getattr(options, name)
    if gib is None:
        return None
    if not 0 < gib < float("inf"):
        raise ValueError(f"{name} is {gib}; allowed: a number > 0")
    return int(gib * GIB / ranks)


def _as_json(plan: Plan, longest: int) -> dict[str, Any]:
    fields = dataclasses.asdict(plan)
    for phase, described in zip(plan.phases, fields["phases"], strict=True):
        described |= {"device_bytes": phase.device_bytes, "host_bytes": phase.host_bytes}
    return {
        "fits": plan.fits,
        "peak_bytes": plan.peak_bytes,
        "peak_phase": plan.peak_phase.name,
        "host_bytes": plan.host_bytes,
        "max_seq_len": longest,
        **fields,
    }


def _print_table(plan: Plan, longest: int) -> None:
    from rich.console import Console

    Console().print(plan_table(plan))
    print(f"longest sequence that fits: {longest} tokens ({longest // 1024}K)" if longest else "no sequence fits")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

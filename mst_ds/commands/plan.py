"""What fits, before anything runs: mst-plan --model ... --num_gpus 8 --gpu H100 --seq_len 1M

Needs neither weights nor a GPU. The exit code is 0 if the plan fits, 1 if it does not, 2 (and one line on stderr) for a
request that cannot be planned.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst_ds.adapter_flags import AdapterRequest
from mst_ds.command_line.entry_point import REQUEST_ERRORS, console, refuse, run_command
from mst_ds.command_line.flags import OneLineParser
from mst_ds.config import DEFAULT_DS_CONFIG, DEFAULT_MODEL, GIB, TrainConfig, parse_seq_len
from mst_ds.files.read_file import expanded
from mst_ds.gpus import DEFAULT_GPU, gpu_by_name
from mst_ds.model_shape import ModelShape, load_config_of_shape, load_model_shape, unknown_positions
from mst_ds.planner import (
    DEFAULT_RESERVE,
    LENGTH_STEP,
    Change,
    Plan,
    Request,
    changes_that_fit,
    longest_of_request,
    plan_of_request,
    plan_table,
    plot_plan,
    read_request,
)

_MOST_BYTES = 2**60
_MOST_RANKS = 2**17
# Flags of a run on which its memory depends, and how their text is read.
_OF_RUN: Mapping[str, Callable[[str], Any]] = {
    "peft_config": os.path.expanduser,
    "lora_r": int,
    "lora_dropout": float,
    "lora_target_modules": str,
    "adapter": os.path.expanduser,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
    "objective": str,
    "optim": str,
}


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        type=os.path.expanduser,
        help="Shipped config, Hugging Face id, or folder with a config.json; well-known ids need no network.",
    )
    parser.add_argument(
        "--ds_config",
        default=DEFAULT_DS_CONFIG,
        help="DeepSpeed JSON with an optional 'mst' block, or a shipped one's name.",
    )
    for name, read in _OF_RUN.items():
        metadata = TrainConfig.__dataclass_fields__[name].metadata
        parser.add_argument(f"--{name}", type=read, nargs=metadata.get("nargs"), help=metadata["help"])
    parser.add_argument("--num_gpus", type=int, default=1, help="Ranks of a node, each with a GPU (default: 1).")
    parser.add_argument("--num_nodes", type=int, default=1, help="Nodes of the run (default: 1).")
    parser.add_argument("--gpu", help="Name that stands for a GPU's memory and rates: H100, H200, A100-80GB ...")
    parser.add_argument(
        "--device_memory_gib", type=float, help="Memory of a GPU; default: that of --gpu, else the 'mst' block's."
    )
    parser.add_argument(
        "--host_memory_gib", type=float, help="Memory of a node, an equal part for each rank; default: not known."
    )
    parser.add_argument("--sp_size", type=int, help="Ranks that share a sequence; default: the 'mst' block's.")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seq_len", help="Tokens in a sequence, over all its shards: 4096, 512K, 1M.")
    length.add_argument("--max_seq_len", action="store_true", help="Plan for the longest sequence that fits.")
    length.add_argument(
        "--table", action="store_true", help="No plan, but the longest sequences on up to num_nodes, for each sp_size."
    )
    parser.add_argument(
        "--trace",
        action="store_true",
        help="Run the model on fake tensors too, and show its peaks beside the formulas.",
    )
    parser.add_argument("--json", action="store_true", help="Print the plan as JSON, with every term and its formula.")
    parser.add_argument("--plot", type=Path, help="Write a picture of the phases to this file, such as plan.png.")
    return parser


def main(argv: Sequence[str]) -> int:
    """Returns the exit code."""
    try:
        options = _parser().parse_args(argv)
        for name in ("num_gpus", "num_nodes"):
            if getattr(options, name) < 1:
                raise ValueError(f"{name} is {getattr(options, name)}; allowed: a whole number >= 1")
        if (ranks := options.num_gpus * options.num_nodes) > _MOST_RANKS:
            raise ValueError(f"num_gpus x num_nodes is {ranks}; allowed: at most {_MOST_RANKS} ranks")
        if options.table:
            return _print_lengths(options)
        answer = _plan(options)
        request, plan = answer.request, answer.plan
        if options.plot is not None:
            plot_plan(plan, expanded(options.plot, "plot"))
        if not options.json:
            # Before a dry run, which takes its time, and may be refused.
            _print_plan(answer, options.gpu)
            if options.plot is not None:
                print(f"picture: {options.plot}")
        traced = _trace(options, plan, request.work.capability) if options.trace else None
    except REQUEST_ERRORS as error:
        return refuse("mst-plan", error)
    if options.json:
        print(json.dumps(_as_json(answer) | ({"trace": traced} if traced else {}), indent=2))
    elif traced is not None:
        _print_trace(traced)
    return 0 if plan.fits else 1


@dataclass(frozen=True)
class _Answer:
    """What is planned, its plan, the longest length that fits, and what makes this one fit if it does not.

    Of several sequences of a sample the longest length, and those of changes, are of one.
    """

    request: Request
    plan: Plan
    longest: int
    changes: tuple[Change, ...]

    @property
    def warning(self) -> str | None:
        return unknown_positions(self.request.work.shape, self.plan.seq_len // self.request.sequences_per_sample)


def _plan(options: argparse.Namespace) -> _Answer:
    # A pair is two sequences.
    per_sample = _train_config(options).sequences_per_sample
    seq_len = LENGTH_STEP if options.max_seq_len else parse_seq_len(options.seq_len) * per_sample
    request = _request(options, num_nodes=options.num_nodes, sp_size=options.sp_size, seq_len=seq_len)
    longest = longest_of_request(request)
    if options.max_seq_len and longest:
        request = request.with_length(longest)
    plan = plan_of_request(request)
    changes = () if plan.fits else changes_that_fit(request)
    states = plan.phases[0]
    if states.device_bytes > plan.device_memory:
        allowed = [str(change) for change in changes] or ["a higher ZeRO stage, more ranks, offload, or more memory"]
        raise ValueError(
            f"the model states of a rank and the reserve take {states.device_bytes / GIB:.1f} GiB, more than the "
            f"{plan.device_memory / GIB:.1f} GiB of its device; allowed: {', or '.join(allowed)}"
        )
    changes = tuple(_per_sequence(change, per_sample) for change in changes)
    return _Answer(request, plan, longest // per_sample, changes)


def _per_sequence(change: Change, per_sample: int) -> Change:
    """Its length as the flag has it, where a sample has several sequences."""
    settings = dict(change.settings)
    if isinstance(settings.get("seq_len"), int):
        settings["seq_len"] = int(settings["seq_len"]) // per_sample
    return Change(tuple(settings.items()))


def _trace(options: argparse.Namespace, plan: Plan, capability: tuple[int, int] | None) -> dict[str, dict[str, int]]:
    """Bytes of activations on the device at the peak of each phase: by the formulas, and on fake tensors."""
    # What the libraries have to say must not mix with the result.
    with contextlib.redirect_stdout(sys.stderr):
        from mst_ds.adapters import requested_config
        from mst_ds.memory.dry_run import dry_run, planned_activations

        peft_config = requested_config(_train_config(options).adapters)
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


def _request(options: argparse.Namespace, *, num_nodes: int, sp_size: int | None, seq_len: int) -> Request:
    gpu = gpu_by_name(options.gpu) if options.gpu is not None else None
    device_memory = _bytes(options, "device_memory_gib")
    if device_memory is None and gpu is not None:
        device_memory = gpu.memory
    train = _train_config(options)
    return read_request(
        options.model if train.adapters is None else _adapted_shape(options.model, train.adapters),
        options.ds_config,
        world_size=options.num_gpus * num_nodes,
        seq_len=seq_len,
        device_memory=device_memory,
        reserve=DEFAULT_RESERVE,
        host_memory=_bytes(options, "host_memory_gib", ranks=options.num_gpus),
        sp_size=sp_size,
        ranks_per_node=options.num_gpus,
        gpu=gpu or DEFAULT_GPU,
        train=train,
    )


def _train_config(options: argparse.Namespace) -> TrainConfig:
    given = {name: getattr(options, name) for name in _OF_RUN if getattr(options, name) is not None}
    config = TrainConfig(**given)
    config.given = frozenset(given)
    config.validate()
    return config


@functools.cache
def _adapted_shape(model: str, adapters: AdapterRequest) -> ModelShape:
    """The model's shape with adapters in it, which takes the seconds that torch, transformers and peft take to load."""
    from mst_ds.adapters import model_on_meta, requested_config
    from mst_ds.structure.trained import trained_shape

    peft_config = requested_config(adapters)
    return trained_shape(load_model_shape(model), model_on_meta(load_config_of_shape(model), peft_config)[0])


def _print_lengths(options: argparse.Namespace) -> int:
    """The longest length for 1, 2, 4 ... nodes and each sp_size; returns the exit code."""
    for name in ("plot", "trace"):
        if getattr(options, name):
            raise ValueError(f"{name} shows one plan, and table makes none; allowed: one of the two")
    shape = load_model_shape(options.model)
    counts = sorted({2**power for power in range(options.num_nodes.bit_length())} | {options.num_nodes})
    found = []
    for num_nodes in counts:
        world_size = options.num_gpus * num_nodes
        for sp_size in range(1, min(shape.max_sp_size, world_size) + 1):
            if world_size % sp_size == 0 and options.sp_size in (None, sp_size):
                request = _request(options, num_nodes=num_nodes, sp_size=sp_size, seq_len=LENGTH_STEP)
                longest = longest_of_request(request) // request.sequences_per_sample
                found.append({"num_nodes": num_nodes, "sp_size": sp_size, "max_seq_len": longest})
    if not found:
        raise ValueError(
            f"sp_size is {options.sp_size}; allowed: a divisor of the ranks of 1, 2, 4 ... nodes, and at most "
            f"{_most_ranks(shape)}"
        )
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print_table(found)
        if positions := _positions(shape, max(point["max_seq_len"] for point in found)):
            print(f"the longest of them{positions}")
    return 0 if any(point["max_seq_len"] for point in found) else 1


def _positions(shape: ModelShape, longest: int) -> str:
    """What memory does not say of the longest sequence."""
    if longest == shape.fixed_positions:
        return "; the model has no more positions"
    if shape.rotary_positions is not None and longest > shape.rotary_positions:
        return f"; by memory alone, the model's config knows {shape.rotary_positions} positions"
    return ""


def _most_ranks(shape: ModelShape) -> str:
    others = ", ".join(shape.other_layers)
    return f"1, for layers of type {others}" if others else f"{shape.num_attention_heads}, the number of query heads"


def _print_table(found: list[dict[str, int]]) -> None:
    from rich.table import Table

    sp_sizes = sorted({point["sp_size"] for point in found})
    table = Table("nodes", *(f"sp {sp_size}" for sp_size in sp_sizes), title="longest sequence that fits, in K tokens")
    lengths = {(point["num_nodes"], point["sp_size"]): f"{point['max_seq_len'] // LENGTH_STEP}" for point in found}
    for num_nodes in sorted({point["num_nodes"] for point in found}):
        table.add_row(str(num_nodes), *(lengths.get((num_nodes, sp_size), "-") for sp_size in sp_sizes))
    console().print(table)


def _bytes(options: argparse.Namespace, name: str, *, ranks: int = 1) -> int | None:
    gib = getattr(options, name)
    if gib is None:
        return None
    if not 1 <= gib * GIB / ranks < _MOST_BYTES:
        raise ValueError(f"{name} is {gib}; allowed: a number > 0, of GiB")
    return int(gib * GIB / ranks)


def _as_json(answer: _Answer) -> dict[str, Any]:
    plan = answer.plan
    return {
        "fits": plan.fits,
        "peak_bytes": plan.peak_bytes,
        "peak_phase": plan.peak_phase.name,
        "host_bytes": plan.host_bytes,
        "max_seq_len": answer.longest,
        "warnings": [] if answer.warning is None else [answer.warning],
        "changes_that_fit": [dict(change.settings) for change in answer.changes],
        **plan.as_dict(),
    }


def _print_plan(answer: _Answer, gpu: str | None) -> None:
    plan, longest = answer.plan, answer.longest
    if answer.request.sequences_per_sample > 1:
        print(f"a sample has two answers: {plan.seq_len} tokens")
    console().print(plan_table(plan))
    if gpu is None:
        print(f"times are by the rates of a {DEFAULT_GPU.name}, as no --gpu is named")
    if answer.warning is not None:
        print(answer.warning)
    if longest:
        in_thousands = f" ({longest // LENGTH_STEP}K)" if longest % LENGTH_STEP == 0 else ""
        known = _positions(answer.request.work.shape, longest)
        print(f"longest sequence that fits: {longest} tokens{in_thousands}{known}")
    else:
        print("no sequence fits")
    if not plan.fits:
        print(f"to make it fit: {', or '.join(map(str, answer.changes)) or 'no single change is enough'}")


def cli() -> int:
    """The command of a process; returns its exit code."""
    return run_command("mst-plan", main)


if __name__ == "__main__":
    sys.exit(cli())

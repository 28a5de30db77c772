"""The flags of mst-plan, and the request that they make."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mst_ds.adapter_flags import AdapterRequest
from mst_ds.answers import gpu_of_file
from mst_ds.command_line.flags import OneLineParser
from mst_ds.config import AUTO, DEFAULT_DS_CONFIG, DEFAULT_MODEL, GIB, TrainConfig
from mst_ds.files.read_file import expanded
from mst_ds.gpus import Gpu, gpu_by_name, gpu_of_device
from mst_ds.model_shape import ModelShape, load_config_of_shape, load_model_shape
from mst_ds.planner import DEFAULT_RESERVE, Request, read_request
from mst_ds.planner.calibration import Calibration, read_calibration
from mst_ds.zero import load_ds_config, split_mst

_MOST_BYTES = 2**60
_MOST_TOKENS = 1e18
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


def parser(description: str | None) -> argparse.ArgumentParser:
    """That of the command."""
    found = OneLineParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    found.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        type=os.path.expanduser,
        help="Shipped config, Hugging Face id, or folder with a config.json; well-known ids need no network.",
    )
    found.add_argument(
        "--ds_config",
        default=DEFAULT_DS_CONFIG,
        help="DeepSpeed JSON with an optional 'mst' block, or a shipped one's name.",
    )
    for name, read in _OF_RUN.items():
        metadata = TrainConfig.__dataclass_fields__[name].metadata
        found.add_argument(f"--{name}", type=read, nargs=metadata.get("nargs"), help=metadata["help"])
    found.add_argument("--num_gpus", type=int, default=1, help="Ranks of a node, each with a GPU (default: 1).")
    found.add_argument("--num_nodes", type=int, default=1, help="Nodes of the run (default: 1).")
    _add_machine(found)
    found.add_argument("--sp_size", type=int, help="Ranks that share a sequence; default: the 'mst' block's.")
    length = found.add_mutually_exclusive_group(required=True)
    length.add_argument(
        "--seq_len",
        nargs="+",
        help="Tokens in a sequence, over all its shards: 4096, 512K, 1M. Several: a row for each. With shares of all "
        "tokens, such as 8K:0.9 128K:0.1: a mix of them.",
    )
    length.add_argument("--max_seq_len", action="store_true", help="Plan for the longest sequence that fits.")
    length.add_argument(
        "--table", action="store_true", help="No plan, but the longest sequences on up to num_nodes, for each sp_size."
    )
    _add_answer(found)
    return found


def _add_machine(found: argparse.ArgumentParser) -> None:
    found.add_argument(
        "--gpu",
        nargs="+",
        help="Name that stands for a GPU's memory and rates: H100, H200, A100-80GB ...; one for all nodes, or one for "
        "each; auto: that of this machine.",
    )
    found.add_argument("--rates", help="JSON file with memory and rates of a GPU that has no such name.")
    found.add_argument(
        "--calibrate",
        type=os.path.expanduser,
        help="Output folder of a run on such a machine, whose times and reserve are taken.",
    )
    found.add_argument(
        "--device_memory_gib",
        type=float,
        nargs="+",
        help="Memory of a GPU, of all nodes' or of each node's; default: that of --gpu, else the 'mst' block's.",
    )
    found.add_argument(
        "--host_memory_gib",
        type=float,
        nargs="+",
        help="Memory of a node, or of each node, an equal part for each rank; default: not known.",
    )


def _add_answer(found: argparse.ArgumentParser) -> None:
    found.add_argument("--tokens", type=float, default=1e9, help="Of a run, whose hours are predicted (default: 1e9).")
    found.add_argument("--price_per_gpu_hour", type=float, help="Predict what these hours cost, too.")
    found.add_argument(
        "--compare",
        action="store_true",
        help="Plans of this length for each sp_size, ZeRO stage and offload of states.",
    )
    found.add_argument("--write", type=Path, help="Write the plan as a DeepSpeed JSON, and print what starts its run.")
    found.add_argument("--report", type=Path, help="Write the answer as Markdown, with every term and its formula.")
    found.add_argument(
        "--trace",
        action="store_true",
        help="Run the model on fake tensors too, and show its peaks beside the formulas.",
    )
    found.add_argument("--json", action="store_true", help="Print the plan as JSON, with every term and its formula.")
    found.add_argument("--plot", type=Path, help="Write a picture of the phases to this file, such as plan.png.")


def check(options: argparse.Namespace) -> None:
    """Look at what argparse does not.

    Raises:
        ValueError: numbers that nothing has, or flags that do not go together.
    """
    _check_values(options)
    _check_together(options)


def _check_values(options: argparse.Namespace) -> None:
    for name in ("num_gpus", "num_nodes"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; allowed: a whole number >= 1")
    if (ranks := options.num_gpus * options.num_nodes) > _MOST_RANKS:
        raise ValueError(f"num_gpus x num_nodes is {ranks}; allowed: at most {_MOST_RANKS} ranks")
    if not 1 <= options.tokens <= _MOST_TOKENS:
        raise ValueError(f"tokens is {options.tokens:g}; allowed: 1 to {_MOST_TOKENS:g}, such as 1e9")
    price = options.price_per_gpu_hour
    if price is not None and not 0 <= price < _MOST_BYTES:
        raise ValueError(f"price_per_gpu_hour is {price:g}; allowed: a number >= 0")
    for name in ("write", "report", "plot"):
        path = getattr(options, name)
        # A path of no letters is this folder.
        if path is not None and expanded(path, name).is_dir():
            raise ValueError(f"{name} is {str(path)!r}, a folder; allowed: the path of a file")


def _check_together(options: argparse.Namespace) -> None:
    named = [name for name in ("gpu", "rates", "calibrate") if getattr(options, name) is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)} each say which GPU is planned for; allowed: one of them")
    for name in ("gpu", "device_memory_gib", "host_memory_gib"):
        if options.table and len(getattr(options, name) or ()) > 1:
            raise ValueError(f"{name} has a value for each node, and a table is of many numbers of nodes; allowed: one")
    several = options.seq_len is not None and len(options.seq_len) > 1
    if options.compare and (several or options.seq_len is None):
        raise ValueError("compare shows plans of one length; allowed: --seq_len with one")
    shown = "table" if options.table else "compare" if options.compare else "several lengths" if several else None
    for name in ("plot", "trace", "write", "report"):
        if shown and getattr(options, name):
            makes = "has many" if shown == "compare" else "make several" if several else "makes none"
            raise ValueError(f"{name} shows one plan, and {shown} {makes}; allowed: one of the two")


def train_config(options: argparse.Namespace) -> TrainConfig:
    """The flags of a run that were given."""
    given = {name: getattr(options, name) for name in _OF_RUN if getattr(options, name) is not None}
    config = TrainConfig(**given)
    config.given = frozenset(given)
    config.validate()
    return config


def request_of(options: argparse.Namespace, *, num_nodes: int, sp_size: int | None, seq_len: int) -> Request:
    """What is to be planned, for the rank whose device has least memory.

    Raises:
        ValueError: a flag, the JSON or the model cannot be planned, in one line with what is allowed.
    """
    train, machine = train_config(options), _machine(options, num_nodes)
    memory = machine.device_memory
    read = functools.partial(
        read_request,
        ds_config=ds_config_of(options.ds_config),
        world_size=options.num_gpus * num_nodes,
        seq_len=seq_len,
        device_memory=memory,
        reserve=machine.reserve,
        host_memory=machine.host_memory,
        sp_size=sp_size,
        rank=0 if memory is None else memory.index(min(memory)),
        ranks_per_node=options.num_gpus,
        gpu=machine.gpu,
        train=train,
    )
    request = read(options.model if train.adapters is None else _adapted_shape(options.model, train.adapters))
    if request.work.shape.mixer_heads:
        request = read(_measured_shape(options.model, train.adapters, request.work.zero.dtype))
    return request


@functools.cache
def ds_config_of(given: str) -> dict[str, Any]:
    """The DeepSpeed JSON, as it stands."""
    return load_ds_config(given)


@dataclass(frozen=True)
class _Machine:
    """Bytes of each rank's device, of the smallest host for a rank, and the GPU for which all wait; None: not known.

    reserve: bytes of a device that tensors cannot have.
    """

    device_memory: tuple[int, ...] | None
    host_memory: int | None
    gpu: Gpu | None
    reserve: int


def _machine(options: argparse.Namespace, num_nodes: int) -> _Machine:
    gpus = [gpu_of_file(options.rates)] if options.rates is not None else None
    calibrated = None if options.calibrate is None else calibration_of(options.calibrate)
    if calibrated is not None:
        gpus = [calibrated.gpu]
    if options.gpu is not None:
        gpus = [_gpu(name) for name in _of_nodes(options, "gpu", num_nodes)]
    memory = _bytes(options, "device_memory_gib", num_nodes)
    if memory is None and gpus is not None and all(gpu.memory for gpu in gpus):
        memory = [gpu.memory for gpu in gpus]
    if memory is None and split_mst(ds_config_of(options.ds_config))[1].device_memory_gib == AUTO:
        others = "--gpu H100 or another's name, --gpu auto, --rates FILE, " if calibrated is None else ""
        unsaid = "" if calibrated is None else ", as a run on a CPU does not say it"
        raise ValueError(
            f"device_memory is not known{unsaid}; allowed: {others}--device_memory_gib, or a number for "
            "device_memory_gib in the 'mst' block"
        )
    of_ranks: tuple[int, ...] | None = None
    if memory is not None:
        of_nodes = memory * num_nodes if len(memory) == 1 else memory
        of_ranks = tuple(count for count in of_nodes for _ in range(options.num_gpus))
    hosts = _bytes(options, "host_memory_gib", num_nodes, ranks=options.num_gpus)
    slowest = None if gpus is None else min(gpus, key=lambda gpu: gpu.flops)
    host = None if hosts is None else min(hosts)
    if calibrated is None:
        return _Machine(of_ranks, host, slowest, DEFAULT_RESERVE)
    # On a CPU the host is the device, and nothing stands beside the tensors.
    beside = calibrated.process_bytes or 0
    return _Machine(of_ranks, None if host is None else max(0, host - beside), slowest, calibrated.reserve or 0)


@functools.cache
def calibration_of(run: str) -> Calibration:
    """What a run has measured."""
    return read_calibration(run)


def _of_nodes(options: argparse.Namespace, name: str, num_nodes: int) -> list[Any]:
    """What a flag says of each node, one value where all are alike."""
    values: list[Any] = getattr(options, name)
    if len(values) not in (1, num_nodes):
        raise ValueError(f"{name} has {len(values)} values for {num_nodes} nodes; allowed: one, or one for each node")
    return values


def _gpu(name: str) -> Gpu:
    return _gpu_here() if name == AUTO else gpu_by_name(name)


def _gpu_here() -> Gpu:
    import torch

    if not torch.cuda.is_available():
        raise ValueError("gpu is 'auto', but this machine has no GPU; allowed: a name such as H100")
    properties = torch.cuda.get_device_properties(0)
    found = gpu_of_device(properties.name, properties.total_memory)
    if found is None:
        raise ValueError(
            f"gpu is 'auto', and nothing is known of this machine's {properties.name!r} with "
            f"{properties.total_memory / GIB:.1f} GiB; allowed: --device_memory_gib, or --rates FILE for its times too"
        )
    return found


@functools.cache
def _adapted_shape(model: str, adapters: AdapterRequest) -> ModelShape:
    """The model's shape with adapters in it, which takes the seconds that torch, transformers and peft take to load."""
    from mst_ds.adapters import model_on_meta, requested_config
    from mst_ds.structure.trained import trained_shape

    peft_config = requested_config(adapters)
    return trained_shape(load_model_shape(model), model_on_meta(load_config_of_shape(model), peft_config)[0])


@functools.cache
def _measured_shape(model: str, adapters: AdapterRequest | None, dtype: str) -> ModelShape:
    """The shape of a model with layers that are not attention, with what these need, which takes seconds to find."""
    from mst_ds.adapters import model_on_meta, requested_config
    from mst_ds.dtypes import DTYPES
    from mst_ds.memory.mixers import with_mixers
    from mst_ds.structure.trained import trained_shape

    on_meta, _ = model_on_meta(load_config_of_shape(model), requested_config(adapters))
    return with_mixers(trained_shape(load_model_shape(model), on_meta), on_meta, DTYPES[dtype])


def _bytes(options: argparse.Namespace, name: str, num_nodes: int, *, ranks: int = 1) -> list[int] | None:
    if getattr(options, name) is None:
        return None
    of_nodes = _of_nodes(options, name, num_nodes)
    for gib in of_nodes:
        if not 1 <= gib * GIB / ranks < _MOST_BYTES:
            raise ValueError(f"{name} is {gib}; allowed: a number > 0, of GiB")
    return [int(gib * GIB / ranks) for gib in of_nodes]

"""Runs of launch/train.py: how they are started, and what they leave.

The ranks of a `Training` start in a moment, forked from a process that has imported everything; `command` is the way of
DeepSpeed's launcher.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from processes import ROOT, free_port
from safetensors.torch import load_file

_context = multiprocessing.get_context("forkserver")
# What takes all the time of a start. The forkserver finds it where this process does.
_context.set_forkserver_preload(["train_imports"])
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])

FLAGS = ("--max_steps", "12", "--seq_len", "256", "--preflight", "false", "--save_steps", "3")
LIMIT = 240


class Training:
    """A run: one process a rank, as a launcher would start them, but no launcher that ends the others for them.

    Args:
        own_flags: further ones, of single ranks.
        output_dir: beside it lies a log of what the ranks of this run, not those of earlier ones, write.
    """

    def __init__(
        self, output_dir: Path, *flags: str, ranks: int = 2, own_flags: Mapping[int, list[str]] = MappingProxyType({})
    ) -> None:
        self.output_dir = output_dir
        self.log = output_dir.with_name(output_dir.name + ".log")
        self.log.unlink(missing_ok=True)
        self.port = free_port()
        arguments = ["--output_dir", str(output_dir), *flags]
        self.processes = []
        for rank in range(ranks):
            variables = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self.port,
            }
            own = [*arguments, *own_flags.get(rank, [])]
            process = _context.Process(target=_train, args=(variables, own, self.log), daemon=True)
            process.start()
            self.processes.append(process)

    def send(self, rank: int, number: signal.Signals) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def blocks(self, rank: int, number: signal.Signals) -> bool:
        """Whether the rank has this signal wait."""
        status = Path(f"/proc/{self.processes[rank].pid}/status").read_text(encoding="utf-8")
        mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
        return bool(int(mask, 16) >> (number - 1) & 1)

    def wait_for(self, happened: Callable[[], bool], *, limit: float = 200) -> bool:
        """Whether it happened while all ranks ran."""
        deadline = time.monotonic() + limit
        while not happened():
            if any(process.exitcode is not None for process in self.processes):
                return happened()
            assert time.monotonic() < deadline, f"it did not happen within {limit} s:\n{self.output}"
            time.sleep(0.001)  # looks again, until it has happened
        return True

    def end(self, *, limit: float = 200) -> list[int | None]:
        """The exit codes, when all have ended by themselves; all are killed after the limit, which is a failure."""
        deadline = time.monotonic() + limit
        for process in self.processes:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
        if any(process.exitcode is None for process in self.processes):
            self.kill()
            raise AssertionError(f"the ranks did not end within {limit} s:\n{self.output}")
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""


def _train(variables: dict[str, str], arguments: list[str], log: Path) -> None:
    os.environ |= variables
    os.chdir(ROOT)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    from mst_ds.commands.train import main

    sys.exit(main(arguments))


def command(output_dir: Path, *flags: str, ranks: int = 2, ds_config: str = "ds_configs/zero3_mst.json") -> list[str]:
    return [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(ranks),
        "--master_port",
        free_port(),
        "launch/train.py",
        "--ds_config",
        ds_config,
        "--output_dir",
        str(output_dir),
        *FLAGS,
        *flags,
    ]


def losses(output_dir: Path) -> list[tuple[int, float]]:
    """By step; a last line that is being written does not count."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    records = [json.loads(line) for line in lines]
    return [(record["step"], record["loss"]) for record in records if "loss" in record]


def assert_same_weights(one: Path, other: Path, file: str = "model.safetensors") -> None:
    left, right = (load_file(folder / "model" / file) for folder in (one, other))
    assert left.keys() == right.keys()
    for name, weight in left.items():
        assert weight.equal(right[name]), name


def assert_same_run(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    assert_same_weights(one, other)


def with_mesh(folder: Path, *, sp_size: int, accumulation: int, layer_chunks: int) -> str:
    """The shipped JSON for so many ranks to a sequence, micro-batches a step and chunks of a layer."""
    ds_config: dict[str, Any] = json.loads((ROOT / "ds_configs" / "zero3_mst.json").read_text(encoding="utf-8"))
    ds_config["mst"] |= {"sp_size": sp_size, "layer_chunks": layer_chunks}
    ds_config["gradient_accumulation_steps"] = accumulation
    path = folder / f"sp{sp_size}.json"
    path.write_text(json.dumps(ds_config), encoding="utf-8")
    return str(path)

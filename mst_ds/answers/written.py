"""A plan as a run takes it: the DeepSpeed JSON with what was chosen, and the command lines that start it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mst_ds.answers.variants import nodes_of
from mst_ds.config import AUTO, TrainConfig
from mst_ds.files.whole_file import replace_file
from mst_ds.planner.request import Request
from mst_ds.planner.types import Plan
from mst_ds.zero import BATCH_FLAGS, load_ds_config


def written_config(ds_config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The JSON that was planned, with the plan's settings in its "mst" block and its batch sizes.

    What is no choice stays: "auto" for what follows from the model or the machine, such as buckets and a device's
    memory.

    Args:
        ds_config: with its "mst" block, as the user wrote it.
    """
    config = load_ds_config(ds_config)
    for key, name in BATCH_FLAGS.items():
        if config.get(key, AUTO) == AUTO:
            config[key] = plan.gradient_accumulation_steps if "accumulation" in name else plan.micro_batch_size
    return config | {"mst": {**config.get("mst", {}), **dataclasses.asdict(plan.settings)}}


def write_config(path: Path, ds_config: Mapping[str, Any], plan: Plan) -> None:
    """Writes `written_config`, all of it or nothing.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, json.dumps(written_config(ds_config, plan), indent=2) + "\n")


def launch_lines(request: Request, plan: Plan, *, model: str, ds_config: str, train: TrainConfig) -> tuple[str, str]:
    """The commands that run the plan: by DeepSpeed's launcher, and under SLURM.

    Args:
        ds_config: the path of its JSON.
        train: whose flags were given; of these the JSON has the batch sizes.
    """
    flags = ["--model", model, "--ds_config", ds_config]
    flags += ["--seq_len", str(plan.seq_len // request.sequences_per_sample)]
    for name in sorted(train.given - set(BATCH_FLAGS.values())):
        value = getattr(train, name)
        # As the parser splits it.
        flags += [f"--{name}", *(str(value).split(",") if name == "lora_target_modules" else [str(value)])]
    nodes, world_size = nodes_of(request), plan.topology.world_size
    of_node = str(min(request.work.ranks_per_node, world_size))
    several = ["--num_nodes", str(nodes), "--hostfile", "hostfile"] if nodes > 1 else []
    sbatch = [f"--nodes={nodes}", f"--ntasks-per-node={of_node}", f"--gpus-per-node={of_node}"]
    return (
        _line(["deepspeed", *several, "--num_gpus", of_node, "launch/train.py", *flags]),
        _line(["sbatch", *sbatch, "slurm/train.sbatch", *flags]),
    )


def _line(words: Sequence[str]) -> str:
    return shlex.join(words)

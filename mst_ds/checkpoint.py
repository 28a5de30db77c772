"""Checkpoints: a training state on disk, complete or not there at all, and the way back from one into a run.

A checkpoint is a folder `step-00000050` with DeepSpeed's own files, each rank's random states, the model's config and
tokenizer, and `state.json`, which says what the run was, and size and checksum of every file. It is written beside its
place and renamed into it when all ranks have written theirs, so that a kill at any moment leaves the checkpoints before
it as they were. All ranks must see the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

STATE_FILE = "state.json"
MODEL_FOLDER = "model"
STATES_FOLDER = "states"
_UNIVERSAL_FOLDER = "universal"
_PARTIAL = ".partial"
_PREFIX = "step-"
_BLOCK_BYTES = 2**24
_ALLOWED = "allowed: an earlier checkpoint, which --resume auto takes where this one is removed"
# Fields of a config that say nothing about what is computed.
_NO_PART_OF_A_MODEL = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"})


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to go on: other sizes of the world, devices or chunk counts are not in it.

    tokenizer: a digest of its vocabulary. peft: the config of the adapters, None without. training: by name, the
    settings whose values a checkpoint holds, so that other ones would be without effect.
    """

    model: dict[str, Any]
    peft: dict[str, Any] | None
    tokenizer: str
    dtype: str
    zero_stage: int
    training: dict[str, Any]

    @classmethod
    def of(
        cls,
        model_config: PreTrainedConfig,
        peft_config: PeftConfig | None,
        tokenizer: PreTrainedTokenizerBase,
        *,
        dtype: str,
        zero_stage: int,
        training: Mapping[str, Any],
    ) -> Identity:
        model = {key: value for key, value in model_config.to_dict().items() if key not in _NO_PART_OF_A_MODEL}
        vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())).encode()
        return cls(
            model=_as_json(model),
            peft=None if peft_config is None else _as_json(peft_config.to_dict()),
            tokenizer=hashlib.sha256(vocabulary).hexdigest(),
            dtype=dtype,
            zero_stage=zero_stage,
            training=_as_json(training),
        )

    def require_same(self, saved: Identity, folder: Path) -> None:
        """Refuse to go on from `folder`.

        Raises:
            ValueError: with the first thing that differs.
        """
        here, there = (_flat(asdict(identity)) for identity in (self, saved))
        differing = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
        if differing == ["tokenizer"]:
            raise ValueError(
                f"the checkpoint {folder} was made with another tokenizer; allowed: the same, or another output_dir"
            )
        if differing:
            name = differing[0]
            raise ValueError(
                f"the checkpoint {folder} was made with {name} {there.get(name)!r}, but this run has "
                f"{here.get(name)!r}; allowed: the same, or another output_dir"
            )


@dataclass(frozen=True)
class Checkpoint:
    """A complete one.

    world_size: of the ranks that wrote it. data: the place in the data. checksums: of its files, see `save_checkpoint`.
    """

    folder: Path
    step: int
    world_size: int
    identity: Identity
    data: Mapping[str, Any]
    checksums: Mapping[str, int]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads what `folder` holds, and makes sure that all of it is there.

    Raises:
        ValueError: no checkpoint, one of another version, or a file of it is missing or has another size.
    """
    file = folder / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no {STATE_FILE}; allowed: a folder {_PREFIX}... of a run")
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        sizes: dict[str, int] = state["sizes"]
        checkpoint = Checkpoint(
            folder=folder,
            step=int(state["step"]),
            world_size=int(state["world_size"]),
            identity=Identity(**state["identity"]),
            data=dict(state["data"]),
            checksums=dict(state["checksums"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is damaged or not of mst_ds ({reason}); {_ALLOWED}") from None
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"the checkpoint {folder} lacks its file {name}; {_ALLOWED}")
        if path.stat().st_size != size:
            raise ValueError(f"the checkpoint's file {path} has {path.stat().st_size} of its {size} bytes; {_ALLOWED}")
    return checkpoint


def require_intact(checkpoint: Checkpoint) -> None:
    """Makes sure, in one process, that every file is as it was written.

    Raises:
        OSError: one is not.
    """
    for name in checkpoint.checksums:
        _require_checksum(checkpoint, name)


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The one of the last step in `folder`; None where there is none. What was not completed does not count.

    Raises:
        ValueError: see `read_checkpoint`: a damaged one is not passed over in silence.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; allowed: a folder of checkpoints there, or another output_dir")
    names = _complete_names(folder)
    return read_checkpoint(folder / names[-1]) if names else None


def save_checkpoint(
    engine: DeepSpeedEngine,
    folder: Path,
    *,
    step: int,
    keep: int,
    identity: Identity,
    data: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> Path:
    """Writes the checkpoint of `step` into `folder`, and then removes all but the `keep` newest. A collective call.

    Raises:
        OSError: a file could not be written, on the rank that raises it. Earlier checkpoints are as they were; the
            other ranks wait, so that this rank must end the job.
    """
    name = f"{_PREFIX}{step:08d}"
    partial = folder / (name + _PARTIAL)
    rank = dist.get_rank()
    if rank == 0:
        remove_unfinished(folder)
        (partial / MODEL_FOLDER).mkdir(parents=True)
    dist.barrier()
    try:
        engine.save_checkpoint(str(partial), tag=STATES_FOLDER, save_latest=False)
        torch.save(_random_states(engine.device), partial / _random_file(rank))
        if rank == 0:
            _write_model_folder(engine, tokenizer, partial / MODEL_FOLDER)
    except RuntimeError as error:  # how torch says that a disk is full
        raise OSError(f"the checkpoint {folder / name} could not be written: {' '.join(str(error).split())}") from error
    dist.barrier()
    names = [str(path.relative_to(partial)) for path in sorted(partial.rglob("*")) if path.is_file()]
    checksums = _shared_by_ranks(names, lambda name: _flush_and_checksum(partial / name))
    if rank == 0:
        state = {
            "step": step,
            "world_size": dist.get_world_size(),
            "identity": asdict(identity),
            "data": dict(data),
            "sizes": {name: (partial / name).stat().st_size for name in names},
            "checksums": checksums,
        }
        (partial / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        _flush_to_disk(partial / STATE_FILE)
        if (folder / name).is_dir():
            _remove(folder / name)
        partial.replace(folder / name)
        _flush_to_disk(folder)
        for old in _complete_names(folder)[:-keep]:
            _remove(folder / old)
    dist.barrier()
    return folder / name


def load_checkpoint(engine: DeepSpeedEngine, checkpoint: Checkpoint, *, seed: int) -> None:
    """Sets the engine, its optimizer and schedule, and this rank's random states. A collective call.

    Where as many ranks wrote it as there are now, the run goes on bit by bit. Else the engine must have been made with
    `universal_setting`, and random states begin anew, from `seed`, the step and the rank.

    Raises:
        OSError: a file is damaged, on the rank that raises it.
    """
    folder, rank = checkpoint.folder, dist.get_rank()
    _shared_by_ranks(sorted(checkpoint.checksums), lambda name: _require_checksum(checkpoint, name))
    is_same_world = checkpoint.world_size == dist.get_world_size()
    if not is_same_world and checkpoint.identity.zero_stage > 0:
        if rank == 0:
            _make_universal(folder)
        dist.barrier()
        tag = _UNIVERSAL_FOLDER
    else:
        tag = STATES_FOLDER
    settings = [_without_schedule(group) for group in engine.optimizer.param_groups]
    try:
        path, _ = engine.load_checkpoint(str(folder), tag=tag)
        assert path is not None, f"DeepSpeed found nothing in {folder}, whose files are all there"
        states = torch.load(folder / _random_file(rank), weights_only=False) if is_same_world else None
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:  # how torch says that a file is damaged
        raise OSError(f"the checkpoint {folder} could not be read: {' '.join(str(error).split())}") from error
    if tag == _UNIVERSAL_FOLDER:
        _mend_optimizer(engine.optimizer, settings)
        dist.barrier()
        if rank == 0:
            shutil.rmtree(folder / _UNIVERSAL_FOLDER)
    if states is not None:
        _set_random_states(states, engine.device)
    else:
        own = np.random.SeedSequence([seed, checkpoint.step, rank]).generate_state(1)[0]
        random.seed(int(own))
        np.random.seed(own)
        torch.manual_seed(int(own))


def universal_setting(checkpoint: Checkpoint | None, world_size: int) -> dict[str, Any]:
    """What DeepSpeed's JSON needs besides, for an engine that goes on from `checkpoint`."""
    if checkpoint is None or checkpoint.world_size == world_size or checkpoint.identity.zero_stage == 0:
        return {}
    return {"checkpoint": {"load_universal": True}}


def remove_unfinished(folder: Path) -> None:
    """Removes what a run that was killed during a save has left."""
    for path in folder.glob(f"{_PREFIX}*{_PARTIAL}"):
        if re.fullmatch(rf"{_PREFIX}\d{{8,}}{re.escape(_PARTIAL)}", path.name):
            shutil.rmtree(path)


def _complete_names(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    # Not a user's copy under a name like it.
    names = [path.name for path in folder.iterdir() if re.fullmatch(rf"{_PREFIX}\d{{8,}}", path.name) and path.is_dir()]
    return sorted(names, key=lambda name: int(name.removeprefix(_PREFIX)))


def _remove(folder: Path) -> None:
    # Not in its place while it is taken apart: a kill would leave a damaged one.
    going = folder.with_name(folder.name + _PARTIAL)
    folder.replace(going)
    shutil.rmtree(going)


def _shared_by_ranks(names: list[str], of_name: Callable[[str], int]) -> dict[str, int]:
    """`of_name` of every name, each computed by one rank. A collective call; rank 0 says which names there are."""
    # A rank that lists a folder of a network itself may not see yet what another has written.
    lists = [names]
    dist.broadcast_object_list(lists)
    world_size = dist.get_world_size()
    own = {name: of_name(name) for name in lists[0][dist.get_rank() :: world_size]}
    of_ranks = [own] * world_size
    dist.all_gather_object(of_ranks, own)
    return {name: number for part in of_ranks for name, number in part.items()}


def _flush_and_checksum(path: Path) -> int:
    _flush_to_disk(path)
    return _checksum(path)


def _require_checksum(checkpoint: Checkpoint, name: str) -> int:
    found = _checksum(checkpoint.folder / name)
    if found != checkpoint.checksums[name]:
        raise OSError(f"the checkpoint's file {checkpoint.folder / name} is not as it was written; {_ALLOWED}")
    return found


def _checksum(path: Path) -> int:
    """CRC-32. torch checks none when it loads a file."""
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_model_folder(engine: DeepSpeedEngine, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """What an export needs beside the weights."""
    model: Any = engine.module
    peft_configs = getattr(model, "peft_config", None)
    if peft_configs:
        model.active_peft_config.save_pretrained(str(folder))
    model.config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _without_schedule(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}


def _mend_optimizer(optimizer: Any, settings: list[dict[str, Any]]) -> None:
    """DeepSpeed 0.19.8, at stage 3, gives every group the settings of the first, such as its weight decay, and all
    states one tensor of steps, which a fused optimizer then counts up once for each of them."""
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    states = getattr(optimizer, "optimizer", optimizer).state
    for state in states.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _make_universal(folder: Path) -> None:
    """DeepSpeed's form of a checkpoint for any number of ranks; whatever is there may be of a kill in the middle."""
    from argparse import Namespace
    from contextlib import redirect_stdout

    from deepspeed.checkpoint import ds_to_universal

    done = folder / _UNIVERSAL_FOLDER
    shutil.rmtree(done, ignore_errors=True)
    options = Namespace(
        input_folder=str(folder / STATES_FOLDER),
        output_folder=str(done),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        ds_to_universal.main(options)


def _random_file(rank: int) -> str:
    return f"random_states_rank_{rank}.pt"


def _random_states(device: torch.device) -> dict[str, Any]:
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states["device"], device)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of fields as "model.hidden_size"."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = value if isinstance(value, dict) else None
        flat |= {key: value} if inner is None else {f"{key}.{name}": each for name, each in inner.items()}
    return flat


def _as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """As it is when it has been written and read; sets, which peft's configs have, in order."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

    fields: dict[str, Any] = json.loads(json.dumps(dict(values), default=plain, sort_keys=True))
    return fields

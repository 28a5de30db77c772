"""Reads a sweep: a YAML file, and over it what the user gave beside it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mst_ds.command_line.flags import unknown_flag
from mst_ds.config import MOST_TOKENS, TrainConfig, nearest, parse_seq_len
from mst_ds.files.read_file import read_yaml
from mst_ds.files.shipped import existing_or_shipped_file
from mst_ds.scaling.sweep import Sweep, Variant

_SIZES = ("sp_size", "seq_len", "num_nodes", "num_gpus")
_KEYS = (*_SIZES, "variants", "train", "time_limit")
_DEFAULTS: Mapping[str, Any] = {"num_nodes": 1, "num_gpus": 1, "sp_size": 1, "variants": {"default": {}}}
_DEFAULT_STEPS = 5
_DEFAULT_MINUTES = 30.0
# Each point has its own.
_OF_POINTS = ("seq_len", "output_dir", "resume", "local_rank")
_TRAIN_FLAGS = tuple(field.name for field in dataclasses.fields(TrainConfig) if field.name not in _OF_POINTS)
_VARIANT_KEYS = ("mst", "ds_config", "train")


def read_sweep(
    path: Path | None = None, given: Mapping[str, Any] | None = None, train: Mapping[str, Any] | None = None
) -> Sweep:
    """What is to be run.

    Args:
        path: YAML, or the name of a shipped one, with any of the keys `sp_size`, `seq_len`, `num_nodes`, `num_gpus` (a
            number, or a list), `variants` (name -> "mst", "ds_config", "train"), `train` (flag -> value) and
            `time_limit` (minutes).
        given: the same keys; wins over the file. Of `variants` it lists names: only these are left.
        train: flags of mst-train; win over those of the file, not over a variant's.

    Raises:
        ValueError: the file is missing or malformed, or anything in it or in the arguments is not allowed, in one line.
    """
    values = {**_DEFAULTS, **({} if path is None else _load(path))}
    chosen = {key: value for key, value in (given or {}).items() if value is not None}
    names = chosen.pop("variants", None)
    values |= chosen
    if "seq_len" not in values:
        raise ValueError("no seq_len is given; allowed: lengths such as 4K 128K, by --seq_len or in the sweep's file")
    numbers = {key: _numbers(key, values[key]) for key in _SIZES}
    flags = {"max_steps": _DEFAULT_STEPS, **_flags("train", values.get("train")), **_flags("train", train)}
    limit = values.get("time_limit", _DEFAULT_MINUTES)
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < float("inf"):
        raise ValueError(f"time_limit is {limit!r}; allowed: minutes, a number > 0")
    return Sweep(
        sp_sizes=numbers["sp_size"],
        seq_lens=numbers["seq_len"],
        num_nodes=numbers["num_nodes"],
        num_gpus=numbers["num_gpus"],
        variants=_chosen(_variants(values["variants"]), names),
        train=flags,
        time_limit=float(limit),
    )


def train_flags(words: Iterable[str]) -> dict[str, str]:
    """What a command line has of train flags, each with a value: `--max_steps 3` or `--max_steps=3`.

    Raises:
        ValueError: no flag of mst-train, or one without a value.
    """
    flags, rest = {}, iter(words)
    for word in rest:
        name, is_given, value = word.partition("=")
        if not name.startswith("--") or name[2:] not in _TRAIN_FLAGS:
            raise unknown_flag(word, (*_KEYS, *_TRAIN_FLAGS))
        found = value if is_given else next(rest, None)
        if found is None or (not is_given and found.startswith("--")):
            raise ValueError(f"{name} has no value; allowed: {name} followed by one")
        flags[name[2:]] = found
    return flags


def _load(path: Path) -> dict[str, Any]:
    file = existing_or_shipped_file(path, "sweep", "sweeps", "YAML file")
    return _object(f"sweep {path}", read_yaml(file), _KEYS)


def _object(what: str, value: Any, allowed: Iterable[str]) -> dict[str, Any]:
    """A mapping with none but these keys; nothing at all is an empty one."""
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {value!r}; allowed: a mapping with the keys {', '.join(allowed)}")
    for key in value:
        if key not in allowed:
            near = nearest(str(key), allowed)
            raise ValueError(f"{what} has the unknown key {key!r}{near}; allowed: {', '.join(allowed)}")
    return value


def _numbers(key: str, value: Any) -> tuple[int, ...]:
    """One number or several, without repetitions, in their order."""
    found = []
    for each in value if isinstance(value, list | tuple) else [value]:
        number = parse_seq_len(each) if key == "seq_len" and isinstance(each, str) else each
        if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= MOST_TOKENS:
            raise ValueError(f"{key} is {each!r}; allowed: whole numbers >= 1, at most {MOST_TOKENS}")
        found.append(number)
    if not found:
        raise ValueError(f"{key} is an empty list; allowed: whole numbers >= 1")
    return tuple(dict.fromkeys(found))


def _flags(what: str, value: Any) -> dict[str, Any]:
    flags = _object(what, value, _TRAIN_FLAGS)
    for name, each in flags.items():
        if isinstance(each, dict | list):
            raise ValueError(f"{name} in {what} is a {type(each).__name__}; allowed: one number or text")
    return flags


def _variants(value: Any) -> tuple[Variant, ...]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"variants is {value!r}; allowed: a mapping from names to {', '.join(_VARIANT_KEYS)}")
    found = []
    for name, given in value.items():
        # A folder is called so.
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise ValueError(f"a variant is called {name!r}; allowed: letters, digits, '_', '.' and '-'")
        what = f"variant {name!r}"
        fields = _object(what, given, _VARIANT_KEYS)
        mst, ds_config = fields.get("mst") or {}, fields.get("ds_config") or {}
        for key, block in (("mst", mst), ("ds_config", ds_config)):
            if not isinstance(block, dict):
                raise ValueError(f"{key} of {what} is {block!r}; allowed: a mapping")
        if "sp_size" in mst or "mst" in ds_config:
            raise ValueError(f"{what} has sp_size or an 'mst' block among its keys; allowed: sp_size of the sweep, mst")
        found.append(Variant(str(name), mst, ds_config, _flags(f"train of {what}", fields.get("train"))))
    return tuple(found)


def _chosen(variants: tuple[Variant, ...], names: Iterable[str] | None) -> tuple[Variant, ...]:
    if names is None:
        return variants
    of_name = {variant.name: variant for variant in variants}
    for name in names:
        if name not in of_name:
            raise ValueError(f"variants is {name!r}{nearest(name, of_name)}; allowed: {', '.join(of_name)}")
    return tuple(of_name[name] for name in dict.fromkeys(names))

"""Adapters of the language model inside a multimodal model, in files that are read with the multimodal model.

Their weights have its names. Their config targets the modules by a pattern that finds them in both models, and nothing
in a vision tower, whose modules often have the same last names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mst_ds.adapters import ADAPTER_FILE
from mst_ds.files.read_file import read_json
from mst_ds.model_folder.whole_class import place_of

_WEIGHTS = "adapter_model.safetensors"
# What peft puts before the names of the model's modules.
_PREFIX = "base_model.model."


def adapter_of_whole(folder: Path, places: Mapping[str, str], targeted: Iterable[str]) -> None:
    """Rewrite an adapter's files, which peft has written for the language model.

    Args:
        places: see `find_places`.
        targeted: the names in the language model of the modules that have adapters.
    """
    from safetensors.torch import load_file, save_file

    file = folder / _WEIGHTS
    renamed = {_in_whole(name, places): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    fields: dict[str, Any] = read_json(folder / ADAPTER_FILE)
    if names := sorted(targeted):
        # The pattern says all of it.
        fields |= dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        fields["target_modules"] = _pattern(names, places)
    for name in ("rank_pattern", "alpha_pattern"):
        if isinstance(fields.get(name), dict):
            fields[name] = {_of_both(key, places): value for key, value in fields[name].items()}
    (folder / ADAPTER_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True), encoding="utf-8")


def name_in_language(name: str, places: Mapping[str, str]) -> str:
    """The name in the language model's adapter of a tensor in a file; a file of the language model has that one."""
    plain = name.removeprefix(_PREFIX)
    for own, place in places.items():
        if plain.startswith(f"{place}."):
            return _PREFIX + f"{own}{plain[len(place) :]}".removeprefix(".")
    return name


def _in_whole(name: str, places: Mapping[str, str]) -> str:
    return _PREFIX + place_of(name.removeprefix(_PREFIX), places)


def _pattern(names: Iterable[str], places: Mapping[str, str]) -> str:
    """A regular expression of these modules' whole names in either model."""
    ends: dict[str, list[str]] = {}
    for name in names:
        own = next(own for own in places if f"{name}.".startswith(f"{own}." if own else ""))
        ends.setdefault(own, []).append(re.escape(name[len(own) :]))
    return "|".join(f"{_start(own, places[own])}(?:{'|'.join(found)})" for own, found in ends.items())


def _of_both(key: str, places: Mapping[str, str]) -> str:
    """A key of one of peft's patterns, which are ends of names: one that begins at the top is of either model."""
    own = next((own for own in places if own and key.startswith(f"{own}.")), None)
    return key if own is None else f"{_start(own, places[own])}{key[len(own) :]}"


def _start(own: str, place: str) -> str:
    """What the names of a module's parts begin with, in the language model or in the whole one."""
    return f"(?:{re.escape(own)}|{re.escape(place)})" if own else f"(?:{re.escape(place)}\\.)?"

"""A GPU of the user's own, from a JSON file with the fields of `mst_ds.gpus.Gpu`."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from mst_ds.config import MOST, nearest
from mst_ds.files.read_file import existing_file, read_json
from mst_ds.gpus import Gpu

_MOST_BYTES = 2**60
_FIELDS = tuple(field.name for field in dataclasses.fields(Gpu) if field.default is dataclasses.MISSING)


def gpu_of_file(given: str | os.PathLike[str]) -> Gpu:
    """Reads one.

    Raises:
        ValueError: there is no such file, a field is missing or unknown, or has a value that no GPU has.
    """
    path = existing_file(given, "rates", "a JSON file with the fields of a GPU")
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no object; allowed: one with the fields {', '.join(_FIELDS)}")
    for key in values:
        if key not in _FIELDS:
            raise ValueError(f"{path} has the field {key!r}{nearest(key, _FIELDS)}; allowed: {', '.join(_FIELDS)}")
    for name in _FIELDS:
        if name not in values:
            raise ValueError(f"{path} has no {name}; allowed: all of {', '.join(_FIELDS)}")
        problem = _problem(name, values[name])
        if problem is not None:
            raise ValueError(f"{name} in {path} is {values[name]!r}; allowed: {problem}")
    numbers: dict[str, Any] = {
        name: float(values[name]) for name in _FIELDS if name not in ("name", "memory", "capability")
    }
    major, minor = values["capability"]
    return Gpu(name=values["name"], memory=values["memory"], capability=(major, minor), **numbers)


def _problem(name: str, value: Any) -> str | None:
    """What is allowed, where this is not."""
    if name == "name":
        return None if isinstance(value, str) and value else "a text"
    if name == "memory":
        return None if _is_whole(value) and 1 <= value <= _MOST_BYTES else "a whole number of bytes >= 1"
    if name == "capability":
        is_pair = isinstance(value, list) and len(value) == 2 and all(_is_whole(part) and part >= 0 for part in value)
        return None if is_pair else "two whole numbers, such as [9, 0]"
    is_rate = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MOST
    return None if is_rate else "a number > 0, of FLOP/s or bytes/s"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

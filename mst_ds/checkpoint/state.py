"""`state.json`, what a checkpoint says of itself: written with a checksum of its own, and checked when it is read."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

_CHECKSUM = "checksum"
_DTYPES = ("fp32", "fp16", "bf16")


def to_text(state: Mapping[str, Any]) -> str:
    """The file's text. A checksum of the rest is added, so that a change by accident is found."""
    rest = json.loads(json.dumps(dict(state)))
    return json.dumps({**rest, _CHECKSUM: _checksum(rest)}, indent=2) + "\n"


def checked(state: Any) -> dict[str, Any]:
    """What `to_text` was given, of what the file's JSON holds.

    Raises:
        ValueError: it was changed, or a field has a value that it cannot have; what has been changed together with its
            checksum must do no harm either.
    """
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__} in place of an object")
    if _CHECKSUM not in state:
        raise ValueError(f"it has no {_CHECKSUM} of its own: an earlier version wrote it, or it was changed")
    state = dict(state)
    if state.pop(_CHECKSUM) != _checksum(state):
        raise ValueError("it is not as it was written")
    # Earlier versions do not have it.
    state.setdefault("eval_loss", None)
    _require(state, _FIELDS, "")
    _require(state["identity"], _FIELDS_OF_IDENTITY, "identity.")
    if state["sizes"].keys() != state["checksums"].keys():
        raise ValueError("sizes and checksums are not of the same files")
    return state


def _require(values: Mapping[str, Any], fields: Mapping[str, Callable[[Any], bool]], prefix: str) -> None:
    for name, is_allowed in fields.items():
        if name not in values:
            raise ValueError(f"it has no {prefix}{name}")
        if not is_allowed(values[name]):
            raise ValueError(f"{prefix}{name} is {_short(values[name])}")


def _is_number(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**63


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _has_numbers_of_files(value: Any) -> bool:
    return isinstance(value, dict) and all(_is_inside(name) and _is_number(value[name]) for name in value)


def _is_inside(name: str) -> bool:
    """Whether the file of that name lies in the checkpoint's folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "step": lambda value: _is_number(value, 1),
    "world_size": lambda value: _is_number(value, 1),
    "identity": lambda value: isinstance(value, dict) and value.keys() == _FIELDS_OF_IDENTITY.keys(),
    "data": _is_object,
    "eval_loss": lambda value: value is None or (isinstance(value, float) and math.isfinite(value)),
    "sizes": _has_numbers_of_files,
    "checksums": _has_numbers_of_files,
}
# Of an `Identity`.
_FIELDS_OF_IDENTITY: Mapping[str, Callable[[Any], bool]] = {
    "model": _is_object,
    "peft": lambda value: value is None or _is_object(value),
    "tokenizer": lambda value: isinstance(value, str),
    "dtype": lambda value: value in _DTYPES,
    "zero_stage": lambda value: _is_number(value) and value <= 3,
    "training": _is_object,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _checksum(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())

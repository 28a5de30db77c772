"""JSON that any reader takes, in files that are whole or not there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_json(value: Any, *, indent: int | None = None) -> str:
    """The JSON of `value`, with null for each NaN and infinity in it.

    Raises:
        TypeError: it holds what JSON cannot.
    """
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def replace_file(path: Path, text: str) -> None:
    """Writes `text` to `path` at once or not at all: what was there stays until all of it is written.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _finite(value: Any) -> Any:
    """`value` with null for each NaN and infinity, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

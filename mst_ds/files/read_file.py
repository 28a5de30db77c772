"""JSON and YAML files that users write: found, read and checked in one way, with errors of one line.

Every such file is UTF-8 text of bounded size and depth, in which no key stands twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yaml import Node

# The largest config on the hub has less than one MiB; PyYAML reads some 100 KiB a second.
_MOST_BYTES_OF_JSON = 2**24
_MOST_BYTES_OF_YAML = 2**18
_MOST_BYTES_OF_TEXT = 2**20
# Ten times what any known config needs, and a tenth of what Python's own recursion stands.
_MOST_LEVELS = 64
# An alias of YAML stands for all of what it names: nine of nine each are four hundred million values.
_MOST_VALUES_OF_YAML = 2**17


def expanded(given: str | os.PathLike[str], name: str) -> Path:
    """The path that the user means by `~` and `~user`.

    Raises:
        ValueError: there is no such user, or the path has a NUL or a name that no file system takes.
    """
    if "\0" in os.fspath(given):
        raise ValueError(f"{name} is {_shortened(os.fspath(given))}; allowed: a path without NUL")
    try:
        path = Path(given).expanduser()
        path.lstat()
    except RuntimeError:
        raise ValueError(f"{name} is {str(given)!r}, but there is no such user here; allowed: a full path") from None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return path  # says who uses it
    except (OSError, UnicodeEncodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise ValueError(f"{name} is {_shortened(os.fspath(given))}: {reason}; allowed: a path that can be") from None
    return path


def existing_file(given: str | os.PathLike[str], name: str, kind: str) -> Path:
    """The file that the user means.

    Raises:
        ValueError: it is not there, with `name` as what was given and `kind` as what is allowed.
    """
    path = expanded(given, name)
    if not path.is_file():
        raise ValueError(f"{name} is {str(given)!r}; allowed: {kind}")
    return path


def read_text(path: Path) -> str:
    """What a file of text holds.

    Raises:
        ValueError: it cannot be read, is too large, or no UTF-8.
    """
    return str(_read(path, _MOST_BYTES_OF_TEXT, str))


def read_json(path: Path, *, is_finite: bool = True) -> Any:
    """What a file of JSON holds.

    Args:
        is_finite: whether numbers have to be; configs of models know Infinity.

    Raises:
        ValueError: it cannot be read, is too large or nested too deeply, is no JSON, or has a key twice.
    """

    def pairs(found: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(found)
        if len(values) != len(found):
            names = [key for key, _ in found]
            twice = next(name for name in values if names.count(name) > 1)
            raise ValueError(f"{path} has the key {_shortened(twice)} twice; allowed: once")
        return values

    def number(text: str) -> float:
        value = float(text)
        if is_finite and not math.isfinite(value):
            raise ValueError(f"{path} has the value {_shortened(text)}; allowed: a number that a computer can hold")
        return value

    def constant(text: str) -> float:
        if is_finite:
            raise ValueError(f"{path} has the value {text}; allowed: a number, which JSON has no {text} for")
        return float(text)

    def load(text: str) -> Any:
        return json.loads(text, object_pairs_hook=pairs, parse_float=number, parse_constant=constant)

    try:
        values = _read(path, _MOST_BYTES_OF_JSON, load)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if _levels(values) > _MOST_LEVELS:
        raise _too_deep(path)
    return values


def read_yaml(path: Path) -> Any:
    """What a file of YAML holds, None if nothing.

    Raises:
        ValueError: it cannot be read, is too large or nested too deeply, is no YAML, or has a key twice.
    """
    import yaml

    def load(text: str) -> Any:
        loader = yaml.SafeLoader(text)
        try:
            tree = loader.get_single_node()
            if tree is None:
                return None
            _check_tree(path, tree)
            return loader.construct_document(tree)
        finally:
            loader.dispose()

    try:
        return _read(path, _MOST_BYTES_OF_YAML, load)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def _read(path: Path, most_bytes: int, load: Callable[[str], Any]) -> Any:
    try:
        size = path.stat().st_size
        if size > most_bytes:
            raise ValueError(f"{path} has {size} bytes; allowed: a file of at most {most_bytes}")
        return load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start}") from None
    except RecursionError:
        raise _too_deep(path) from None
    except ValueError as error:
        if str(path) in str(error) or isinstance(error, json.JSONDecodeError):
            raise
        # A whole number of thousands of digits, a date that no calendar has.
        raise ValueError(f"{path} has a value that cannot be read: {error}") from None


def _too_deep(path: Path) -> ValueError:
    return ValueError(f"{path} is nested too deeply; allowed: at most {_MOST_LEVELS} levels")


def _levels(values: Any) -> int:
    """How deep it is nested, counted level by level, because it may be deeper than Python's recursion."""
    level, count = [values], 0
    while level:
        count += 1
        level = [
            below
            for value in level
            if isinstance(value, dict | list)
            for below in (value.values() if isinstance(value, dict) else value)
        ]
    return count


def _check_tree(path: Path, tree: Node) -> None:
    """Depth, number of values, and keys of YAML, which takes the last of equal ones without a word."""
    from yaml import MappingNode, SequenceNode

    level: list[Node] = [tree]
    levels = count = 0
    while level:
        levels, count = levels + 1, count + len(level)
        if levels > _MOST_LEVELS:
            raise _too_deep(path)
        if count > _MOST_VALUES_OF_YAML:
            raise ValueError(f"{path} has more than {_MOST_VALUES_OF_YAML} values; allowed: fewer, or fewer aliases")
        below: list[Node] = []
        for node in level:
            if isinstance(node, MappingNode):
                seen: set[str] = set()
                for key, value in node.value:
                    # By its text: a number and the same digits in quotes would become one name.
                    if isinstance(key.value, str) and key.value in seen:
                        line = key.start_mark.line + 1
                        raise ValueError(f"{path} has {key.value!r} twice (line {line}); allowed: once")
                    seen.add(str(key.value))
                    below += [key, value]
            elif isinstance(node, SequenceNode):
                below += node.value
        level = below


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:77]}...")

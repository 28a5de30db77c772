"""Files of JSON and YAML, as bad as they can be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mst_ds.files.read_file import existing_file, expanded, read_json, read_yaml

DEEP = 100_000
# Nine of nine of nine ... values, in a few lines.
ALIASES = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else '1'] * 9)}]\n" for i in range(9))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * DEEP + "]" * DEEP, "is nested too deeply; allowed: at most 64 levels"),
        ("[" * 65 + "]" * 65, "is nested too deeply; allowed: at most 64 levels"),
        ('{"a": {"b": 1, "c": 2, "b": 3}}', "has the key 'b' twice; allowed: once"),
        ('{"a": 1e999}', "has the value '1e999'; allowed: a number that"),
        ('{"a": -Infinity}', "has the value -Infinity; allowed: a number, which JSON has no -Infinity for"),
        ("9" * 5000, "has a value that cannot be read: Exceeds the limit"),
        ("{", "is not JSON: Expecting property name"),
        ("\xff", "is not UTF-8 text: byte 0"),
        (" " * (2**24 + 1), "has 16777217 bytes; allowed: a file of at most 16777216"),
    ],
)
def test_bad_json(content: str, says: str, tmp_path: Path) -> None:
    refuses(read_json, content, says, tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[" * 2000 + "]" * 2000, "is nested too deeply; allowed: at most 64 levels"),
        ("&a [*a]", "is nested too deeply"),
        ("a: {b: 1, c: 2, b: 3}", r"has 'b' twice \(line 1\); allowed: once"),
        ("- {a: 1}\n- {a: 1,\n a: 2}", r"has 'a' twice \(line 3\)"),
        (ALIASES, "has more than 131072 values; allowed: fewer, or fewer aliases"),
        ("1: 2\n'1': 3", r"has '1' twice \(line 2\)"),
        ("a: 2024-99-99", "has a value that cannot be read: month must be"),
        ("a: {", "is not YAML"),
        ("\xff", "is not UTF-8 text: byte 0"),
        ("#" * (2**18 + 1), "has 262145 bytes; allowed"),
    ],
)
def test_bad_yaml(content: str, says: str, tmp_path: Path) -> None:
    refuses(read_yaml, content, says, tmp_path)


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_what_is_no_file(read: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read: Is a directory"):
        read(tmp_path)


def refuses(read: Any, content: str, says: str, folder: Path) -> None:
    path = folder / "file"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=says) as error:
        read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_what_is_right_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text('{"a": [1e5, {"b": null}], "c": Infinity}')
    assert read_json(path, is_finite=False) == {"a": [1e5, {"b": None}], "c": math.inf}
    path.write_text("[" * 63 + "1" + "]" * 63)
    assert read_json(path) is not None
    path.write_text("a: &x {b: 1}\nc: {<<: *x, d: 2}\n1: 2")
    assert read_yaml(path) == {"a": {"b": 1}, "c": {"b": 1, "d": 2}, 1: 2}
    path.write_text("# nothing")
    assert read_yaml(path) is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            "~nobody_of_this_name/x",
            "thing is '~nobody_of_this_name/x', but there is no such user here; allowed: a full",
        ),
        ("n" * 300, "thing is 'n+[.]{3}': File name too long; allowed: a path that can be"),
        ("a\0b", "allowed: a path without NUL"),
        ("a\ud800b", "not text in UTF-8; allowed"),
    ],
)
def test_names_that_cannot_be(given: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        existing_file(given, "thing", "an existing file")


def test_a_home_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x").touch()
    assert existing_file("~/x", "thing", "an existing file") == tmp_path / "x"
    assert expanded("~/y", "thing") == tmp_path / "y"
    with pytest.raises(ValueError, match="thing is '~/y'; allowed: an existing file"):
        existing_file("~/y", "thing", "an existing file")
    with pytest.raises(ValueError, match="allowed: an existing file"):
        existing_file(tmp_path, "thing", "an existing file")

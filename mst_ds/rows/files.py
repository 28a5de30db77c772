"""The rows of a file: .jsonl, .json and .csv, and these compressed by gzip or Zstandard."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO, TypeAlias

from mst_ds.rows.json_lines import lines_of

Row: TypeAlias = tuple[str, dict[str, Any]]

FORMS = (".jsonl", ".json", ".csv")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# Of a file, for one step through it.
_AT_ONCE = 2**20
_BLANK = re.compile(r"\s*")


def form_of(file: Path) -> str:
    """The extension in small letters; of compressed rows that of what was compressed: ".jsonl" of "a.jsonl.gz"."""
    *_, before, last = "", "", *(suffix.lower() for suffix in file.suffixes)
    return before if last in _COMPRESSIONS and before in FORMS else last


def rows_of(file: Path) -> Iterator[Row]:
    """Each row, with its name for a message, as "line 3 of 'a.jsonl'", or "row 3 of 'a.csv'".

    A .json file is a list of objects, or is read as .jsonl; of neither is more than a row in memory, and what is read
    ahead. A .csv file has commas, and the names of its columns in its first row; all that it holds is text.

    Raises:
        ValueError: a row is none, the text is not UTF-8, or what was compressed is damaged.
        OSError: the file cannot be read.
    """
    name, form = str(file), form_of(file)
    with opened(file) as stream:
        try:
            if form == ".csv":
                yield from _of_csv(io.TextIOWrapper(stream, "utf-8-sig", newline=""), name)
            elif form == ".json" and _is_list(file):
                yield from _of_list(io.TextIOWrapper(stream, "utf-8-sig"), name)
            else:
                yield from lines_of(stream, name)
        except OSError as error:
            if file.suffix.lower() not in _COMPRESSIONS:
                raise
            reason = " ".join(str(error).split())
            raise ValueError(f"{name!r} cannot be read ({reason}); allowed: a whole {file.suffix} file") from error


def opened(file: Path) -> IO[bytes]:
    """The bytes of the file, or those that were compressed."""
    compression = _COMPRESSIONS.get(file.suffix.lower())
    if compression is None:
        return file.open("rb")
    import pyarrow as pa

    # Several files that were compressed one by one are read as the one that they make together.
    return io.BufferedReader(pa.input_stream(str(file), compression=compression), _AT_ONCE)


def _is_list(file: Path) -> bool:
    with opened(file) as stream:
        begin = stream.read(_AT_ONCE)
    return begin.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _of_list(text: TextIO, name: str) -> Iterator[Row]:
    items = _items(text)
    number = 1
    while True:
        where = f"row {number} of {name!r}"
        try:
            row = next(items, None)
        except json.JSONDecodeError as error:  # whose place is that in what is left of the file
            raise ValueError(f"{where} is not JSON ({error.msg}); allowed: a list of objects") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where} is not JSON in UTF-8 ({error}); allowed: a list of objects") from None
        if row is None:
            return
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not an object; allowed: a list of objects")
        yield where, row
        number += 1


def _items(text: TextIO) -> Iterator[Any]:
    """The items of a JSON list, each as soon as all of it is read; a null among them is the text "null"."""
    decoder = json.JSONDecoder()
    buffer, at = text.read(_AT_ONCE), 0
    before = "["
    while True:
        while (at := _after_blank(buffer, at)) == len(buffer):
            buffer, at = text.read(_AT_ONCE), 0
            if not buffer:
                raise ValueError("the list has no end")
        if before != "[" and buffer[at] == "]":
            return _require_end(buffer, at + 1, text)
        if buffer[at] != before:
            raise ValueError(f"{buffer[at : at + 20]!r} stands where a comma or the list's end should")
        at += 1
        while True:
            start = _after_blank(buffer, at)
            if before == "[" and buffer[start : start + 1] == "]":
                return _require_end(buffer, start + 1, text)
            try:
                item, end = decoder.raw_decode(buffer, start)
                break
            except json.JSONDecodeError:
                # Twice as much each time: a long item is begun again few times.
                more = text.read(max(_AT_ONCE, len(buffer) - at))
                if not more:
                    raise
                buffer, at = buffer[at:] + more, 0
        yield "null" if item is None else item
        at, before = end, ","


def _require_end(buffer: str, at: int, text: TextIO) -> None:
    while (at := _after_blank(buffer, at)) == len(buffer):
        buffer, at = text.read(_AT_ONCE), 0
        if not buffer:
            return
    raise ValueError(f"{buffer[at : at + 20]!r} stands behind the end of the list")


def _after_blank(buffer: str, at: int) -> int:
    found = _BLANK.match(buffer, at)
    return at if found is None else found.end()


def _of_csv(text: TextIO, name: str) -> Iterator[Row]:
    # A cell may be a book; the limit is one of all readers.
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(text, strict=True)
    number = 1
    while True:
        where = f"row {number} of {name!r}"
        try:
            row = next(reader, None)
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{where} is not CSV in UTF-8 ({error}); allowed: cells parted by commas") from None
        if row is None:
            return
        if None in row or None in row.values():
            columns = len(reader.fieldnames or ())
            raise ValueError(f"{where} has not the {columns} cells of the first row; allowed: as many in each row")
        yield where, row
        number += 1
